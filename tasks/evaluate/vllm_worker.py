"""Answers a request with vLLM: `python -P vllm_worker.py request.json answers.jsonl`, with the Python that has vLLM.

This is a script for vLLM's environment and imports nothing from this project. `-P` keeps Python from importing the
`statistics` in this folder instead of its own. It exits as soon as its standard input closes.
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

BATCHED_TOKENS = 2048  # per step; the likelihood needs a row of fp32 logits for each


def main(request_file: Path, answers: Path) -> None:
    """Answer the items of a request batch by batch, and append one line per item to `answers`."""
    request = json.loads(request_file.read_text(encoding="utf-8"))
    model = load(request)
    items = request["items"]
    with answers.open("a", encoding="utf-8") as lines:
        for batch in request["batches"]:
            answered = answer(model, request, [(at, items[at]) for at in batch])
            lines.write("".join(json.dumps(one) + "\n" for one in answered))
            lines.flush()


def load(request: dict[str, Any]) -> Any:
    """The model on as many GPUs as divide its attention heads, or on the CPU, with the server's options."""
    from vllm import LLM  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    gpus = 0 if current_platform.is_cpu() else current_platform.device_count()
    return LLM(
        request["model"],
        dtype=request["dtype"],
        seed=request["seed"],
        tensor_parallel_size=math.gcd(gpus, request["heads"]) if gpus else 1,
        max_num_batched_tokens=BATCHED_TOKENS,
        enforce_eager=not gpus,
        trust_remote_code=False,
    )


def answer(model: Any, request: dict[str, Any], batch: list[tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The answers to a batch of items; `at` is an item's index.

    End-of-turn tokens and penalties come from the model's generation_config.json, as in the server. An item that is
    empty or exceeds the context has an empty answer, or a likelihood of NaN.
    """
    context = model.model_config.max_model_len
    started = time.monotonic()
    greedy = generate(model, request, batch, {"temperature": 0.0})
    seconds = time.monotonic() - started
    count, drawn = request["samples"], {}
    if count:
        # Samples use the engine's seed: with a seed per request, vLLM fails on a CPU if a prompt takes two steps.
        drawn = generate(model, request, batch, {"temperature": request["temperature"], "n": count})
    likely = _generate(model, [(at, *scoring(item)) for at, item in batch if 0 < len(item["whole"]) <= context])
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


def generate(
    model: Any, request: dict[str, Any], batch: list[tuple[int, dict[str, Any]]], options: dict[str, Any]
) -> dict[int, Any]:
    """vLLM's outputs for the prompts that fit the context, by index."""
    from vllm import SamplingParams

    context = model.model_config.max_model_len
    options = model.model_config.get_diff_sampling_param() | {"top_p": 1.0, "top_k": 0, "detokenize": False} | options

    def sampling(prompt: list[int]) -> Any:
        return SamplingParams(**options | {"max_tokens": min(request["max_new_tokens"], context - len(prompt))})

    prompts = [(at, item["prompt"]) for at, item in batch if 0 < len(item["prompt"]) < context]
    return _generate(model, [(at, prompt, sampling(prompt)) for at, prompt in prompts])


def _generate(model: Any, requests: list[tuple[int, list[int], Any]]) -> dict[int, Any]:
    """vLLM's outputs for prompts with their sampling parameters, by index."""
    if not requests:
        return {}
    prompts = [{"prompt_token_ids": tokens} for _, tokens, _ in requests]
    outputs = model.generate(prompts, [sampling for _, _, sampling in requests], use_tqdm=False)
    return {at: output for (at, _, _), output in zip(requests, outputs, strict=True)}


def scoring(item: dict[str, Any]) -> tuple[list[int], Any]:
    """The prompt and options that give the likelihood of an item's tokens: all tokens before the last scored one.

    vLLM always generates a token, and after a conversation that fills the context there is no room for one. So the
    likelihood of the last scored token is taken from the generation step.
    """
    from vllm import SamplingParams

    last = item["scored"][-1]
    sampling = SamplingParams(
        max_tokens=1, prompt_logprobs=0, logprob_token_ids=[item["whole"][last]], temperature=0.0, detokenize=False
    )
    return item["whole"][:last], sampling


def nll(item: dict[str, Any], output: Any) -> float:
    """Summed negative log-likelihood (nats) of an item's scored tokens."""
    *before, last = item["scored"]
    whole = item["whole"]
    nats = [output.prompt_logprobs[place][whole[place]].logprob for place in before]
    return -math.fsum([*nats, output.outputs[0].logprobs[0][whole[last]].logprob])


def exit_with_parent() -> None:
    """Kill all processes of this session when standard input closes: the parent has stopped or died."""
    while os.read(0, 1):
        pass
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=exit_with_parent, daemon=True).start()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
