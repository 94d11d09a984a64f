"""`python -m benchmarks.evaluate`: the speed of Forge's greedy answers, compared with transformers.

The prompts are held-out rows of the demonstration.

The last line on stdout is one JSON object. See docs/benchmarks.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from forge.core.contracts import Base, Source
from forge.core.recipe import EvaluationRecipe
from forge.core.settings import Settings
from forge.models.chat import ChatTokenizer
from forge.registry.packages import LocalBase
from forge.storage import DirectoryStore
from forge.storage.recipes import load_recipe
from tasks.evaluate.answer import TransformersEngine, answer_with_transformers, batches
from tasks.evaluate.ask import ask, ask_all
from tasks.evaluate.items import Item, read_items
from tasks.finetune.process_group import Rank
from tasks.finetune.run import train
from tasks.preprocess.prepare import prepare
from tasks.preprocess.sources import digest_source

PIPELINE_BATCH = 32


def main() -> None:
    """Train the demonstration's model briefly, and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forge-benchmark-") as home:
        model, items = make_model(Path(home), options.prompts)
        say(f"{len(items)} prompts, {torch.get_num_threads()} threads")
        print(json.dumps(measure(model, items, options.rounds)))


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def make_model(home: Path, prompts: int) -> tuple[Path, list[Item]]:
    """The default recipe's model after a third of an epoch (enough to end its answers), and held-out prompts."""
    recipe = load_recipe("tiny-cpu")
    store = DirectoryStore(home / "store")
    source = Source(uri="demonstration", digest=digest_source(recipe.data), store=store.identity)
    settings = Settings(home=home)
    dataset = prepare(source, recipe.data, Base(), store, settings)
    training = recipe.training.model_copy(update={"epochs": 0.33, "nproc_per_node": 1})
    rank = Rank(0, 1, torch.device("cpu"))
    model = train(rank, dataset, Base(), recipe.model, training, store, settings)
    if model is None:
        raise RuntimeError("the first rank returns a model")
    items, _ = read_items(store.path(dataset.uri) / "heldout.jsonl", prompts, None)
    return store.path(model.uri) / "model", items


def measure(directory: Path, items: list[Item], rounds: int) -> dict[str, Any]:
    """Seconds to answer all prompts in each way, measured in turn for several rounds."""
    recipe = EvaluationRecipe.model_validate({"max_new_tokens": 48})
    base = LocalBase(str(directory))
    answerer = TransformersEngine(base, recipe, "cpu")
    chat = ChatTokenizer(answerer.tokenizer, str(directory))
    prompts = [ask(chat, item).prompt for item in items]
    generator: Any = pipeline("text-generation", model=answerer.model, tokenizer=answerer.tokenizer)
    chats = [item.messages for item in items]

    def forge() -> list[str]:
        texts = [""] * len(prompts)
        for batch in batches([len(prompt) for prompt in prompts], recipe.batch_size):
            for at, tokens in zip(batch, answerer.generate([prompts[at] for at in batch]), strict=True):
                texts[at] = answerer.text(tokens)
        return texts

    @torch.inference_mode()
    def one_by_one() -> list[str]:
        return [one_answer(answerer, prompt, recipe.max_new_tokens) for prompt in prompts]

    def with_pipeline() -> list[str]:
        answers = generator(
            chats,
            batch_size=PIPELINE_BATCH,
            do_sample=False,
            max_new_tokens=recipe.max_new_tokens,
            return_full_text=False,
        )
        return [answer[0]["generated_text"] for answer in answers]

    def whole_stage() -> list[str]:
        return [
            answer.text
            for answer in answer_with_transformers(base, ask_all(base, items), recipe, ["cpu"], lambda done: None)
        ]

    ways: dict[str, Callable[[], Sequence[str]]] = {
        "forge": forge,
        "one": one_by_one,
        "pipeline": with_pipeline,
        "whole": whole_stage,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, Sequence[str]] = {}
    for number in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            texts[name] = way()
            seconds[name].append(time.perf_counter() - started)
        say(f"round {number + 1}: " + ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()))
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    same = {
        name: sum(a.strip() == b.strip() for a, b in zip(texts["forge"], texts[name], strict=True)) for name in texts
    }
    return {
        "ratio_one": round(median["one"] / median["forge"], 2),
        "ratio_pipeline": round(median["pipeline"] / median["forge"], 2),
        "prompts": len(items),
        **{f"{name}_seconds": round(taken, 3) for name, taken in median.items()},
        "same_as_one": same["one"],
        "same_as_pipeline": same["pipeline"],
    }


def one_answer(model: TransformersEngine, prompt: list[int], max_new_tokens: int) -> str:
    """The answer to one prompt by transformers alone."""
    tokens = torch.tensor([prompt])
    output = model.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    return model.text(output[0, len(prompt) :].tolist())


if __name__ == "__main__":
    main()
