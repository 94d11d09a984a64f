"""Answers a request with vLLM: `python -P vllm_worker.py request.json answers.jsonl`, by the Python that has vLLM.

It is a program of that environment, not a module of this project, of which it imports nothing. `-P` keeps Python from
looking for `vllm` and `statistics` among the files beside it. It ends as soon as its standard input does.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCHED_TOKENS = 2048  # a step; the likelihood holds a row of logits for each, in fp32


def main(request: Path, answers: Path) -> None:
    """Answer what is asked in `request`, and append an item's answer a line to `answers`, batch by batch."""
    asked = json.loads(request.read_text())
    model = load(asked)
    items = asked["items"]
    with answers.open("a") as lines:
        for batch in asked["batches"]:
            found = answer(model, asked, [(at, items[at]) for at in batch])
            lines.write("".join(json.dumps(one) + "\n" for one in found))
            lines.flush()


def load(asked: dict[str, Any]) -> Any:
    """The model on all GPUs that can share its attention heads evenly, or on the CPU, set up as the server does it."""
    from vllm import LLM  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    gpus = 0 if current_platform.is_cpu() else current_platform.device_count()
    return LLM(
        asked["model"],
        dtype=asked["dtype"],
        seed=asked["seed"],
        tensor_parallel_size=math.gcd(gpus, asked["heads"]) if gpus else 1,
        max_num_batched_tokens=BATCHED_TOKENS,
        enforce_eager=not gpus,
        trust_remote_code=False,
    )


def answer(model: Any, asked: dict[str, Any], batch: list[tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The answers to a batch of items, each with its place.

    The end of a turn, and penalties if there are any, are those of the model's generation_config.json, as the server
    takes them. An item that is empty, or longer than the context, has no answer, or no likelihood (NaN).
    """
    from vllm import SamplingParams

    room = model.model_config.max_model_len
    usual = model.model_config.get_diff_sampling_param()
    usual |= {"top_p": 1.0, "top_k": 0, "detokenize": False}

    def most(item: dict[str, Any]) -> int:
        return int(min(asked["max_new_tokens"], room - len(item["prompt"])))

    def run(parts: list[tuple[int, list[int], Any]]) -> dict[int, Any]:
        prompts = [{"prompt_token_ids": tokens} for _, tokens, _ in parts]
        found = model.generate(prompts, [how for _, _, how in parts], use_tqdm=False) if parts else []
        return {at: output for (at, _, _), output in zip(parts, found, strict=True)}

    fitting = [(at, item) for at, item in batch if 0 < len(item["prompt"]) < room]
    started = time.monotonic()
    greedy = run(
        [
            (at, item["prompt"], SamplingParams(**usual | {"temperature": 0.0, "max_tokens": most(item)}))
            for at, item in fitting
        ]
    )
    seconds = time.monotonic() - started
    drawn = {}
    if count := asked["samples"]:
        # Drawn by the engine's seed: with seeds of their own, vLLM fails on a CPU where a prompt is read in two steps.
        how = usual | {"temperature": asked["temperature"], "n": count}
        drawn = run([(at, item["prompt"], SamplingParams(**how | {"max_tokens": most(item)})) for at, item in fitting])
    likely = run([(at, *scoring(item)) for at, item in batch if 0 < len(item["whole"]) <= room])
    for at, item in batch:
        first = greedy[at].outputs[0] if at in greedy else None
        yield {
            "at": at,
            "tokens": list(first.token_ids) if first else [],
            "ended": first is not None and first.finish_reason == "stop",
            "seconds": seconds,
            "nll": nll(item, likely[at]) if at in likely else math.nan,
            "samples": [list(one.token_ids) for one in drawn[at].outputs] if at in drawn else [[]] * count,
        }


def scoring(item: dict[str, Any]) -> tuple[list[int], Any]:
    """What gives the likelihood of an item's tokens: those before the last scored one as a prompt, and that one's own.

    vLLM always generates a token, for which a conversation that fills the context has no room. So the last one is
    looked up among what would come next.
    """
    from vllm import SamplingParams

    last = item["scored"][-1]
    how = SamplingParams(
        max_tokens=1, prompt_logprobs=0, logprob_token_ids=[item["whole"][last]], temperature=0.0, detokenize=False
    )
    return item["whole"][:last], how


def nll(item: dict[str, Any], output: Any) -> float:
    """Summed negative log likelihood (nats) of an item's scored tokens."""
    *before, last = item["scored"]
    whole = item["whole"]
    nats = [output.prompt_logprobs[place][whole[place]].logprob for place in before]
    return -math.fsum([*nats, output.outputs[0].logprobs[0][whole[last]].logprob])


def end_with_asker() -> None:
    """End, with all processes of this session, when standard input does: who asks has stopped, or died."""
    while os.read(0, 1):
        pass
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with_asker, daemon=True).start()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
