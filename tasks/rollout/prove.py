"""Proves over the API that the served model is the evaluated one: same tokens, same answers, same likelihoods."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from openai import OpenAIError
from pyarrow import parquet

from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.serving.client import chat, client_of
from forge.serving.vllm_client import UNREACHABLE, VLLM

COLUMNS = ["messages", "tools", "candidate_answer", "candidate_nll", "prompt_tokens", "whole_tokens", "scored"]
HELLO = [{"role": "user", "content": "Hello"}]


def read_replay(evaluation: Path, count: int) -> list[dict[str, Any]]:
    """The first evaluated prompts, with the candidate's answers, their NLL and their tokens.

    `prompt_tokens` is None if the chat template contains the current date.
    """
    rows = parquet.read_table(evaluation / "items.parquet", columns=COLUMNS).to_pylist()[:count]
    for row in rows:
        row["messages"] = json.loads(row["messages"])
        row["tools"] = json.loads(row["tools"] or "null")
    return rows


def prove(
    endpoint: str,
    versioned: str,
    evaluation: Path | None,
    recipe: ServingRecipe,
    check: Callable[[], None] = lambda: None,
) -> str:
    """Replay evaluated prompts over the API, under the versioned name; returns the agreement, such as "16 of 16".

    Raises ForgeError if the model is not listed, a request fails, a prompt has other tokens than in evaluation, too few
    answers agree, or the expected answers are not as likely. Without an evaluation the model only has to answer, and
    the result is "". `check` is called before each request, and can raise an error to end the proof.
    """
    client, vllm = client_of(endpoint), VLLM(endpoint.removesuffix("/v1"))
    try:
        served = [model.id for model in client.models.list()]
        if versioned not in served:
            raise ForgeError(f"serves {', '.join(served)}, not {versioned}", where=f"the server at {endpoint}")
        if evaluation is None:
            chat(client, versioned, HELLO, max_tokens=8)
            return ""
        rows = read_replay(evaluation, recipe.replay)
        card = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
        max_tokens = card["recipe"]["max_new_tokens"]
        _compare_tokens(vllm, versioned, _checked(rows, check))
        answers = [chat(client, versioned, row["messages"], row["tools"], max_tokens) for row in _checked(rows, check)]
        agreement = _compare_answers(rows, answers, recipe.min_agreement)
        _compare_likelihoods(vllm, versioned, _checked(rows, check), recipe.max_nll_gap)
        return agreement
    except (OpenAIError, *UNREACHABLE) as error:
        raise ForgeError(f"did not answer: {error}", where=f"the server at {endpoint}") from None


def _checked(rows: list[dict[str, Any]], check: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """The rows, with a check before each."""
    for row in rows:
        check()
        yield row


def _compare_tokens(vllm: VLLM, versioned: str, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        expected = row["prompt_tokens"]
        if not expected:  # the template rejected the prompt, or contains the current date
            continue
        tokens = vllm.tokens(versioned, row["messages"], row["tools"])
        if tokens != expected:
            pairs = enumerate(zip(tokens, expected, strict=False))
            at = next((at for at, (served, evaluated) in pairs if served != evaluated), None)
            difference = f"from token {at} on" if at is not None else f"{len(tokens)} instead of {len(expected)}"
            raise ForgeError(
                f"the served model gets different tokens than in evaluation ({difference}) for the prompt "
                f"{row['messages'][-1]['content']!r}: its chat template or its tokenizer differs"
            )


def _compare_answers(rows: list[dict[str, Any]], answers: list[str], min_agreement: float) -> str:
    # Evaluation's own comparison ignores white space at both ends too.
    differing = [
        (row, now) for row, now in zip(rows, answers, strict=True) if row["candidate_answer"].strip() != now.strip()
    ]
    agreeing = len(rows) - len(differing)
    if agreeing < min_agreement * len(rows):
        row, now = differing[0]
        raise ForgeError(
            f"the served model does not answer as it did in evaluation: {agreeing} of {len(rows)} answers agree, and "
            f"serving.min_agreement is {min_agreement}. To {row['messages'][-1]['content']!r} it answered {now!r}, "
            f"in evaluation {row['candidate_answer']!r}"
        )
    return f"{agreeing} of {len(rows)}"


def _compare_likelihoods(vllm: VLLM, versioned: str, rows: Iterable[dict[str, Any]], limit: float) -> None:
    gaps = []
    for row in rows:
        nll = row["candidate_nll"]
        if row["scored"] and nll is not None and nll == nll:
            gaps.append(abs(vllm.prompt_nll(versioned, row["whole_tokens"], row["scored"]) - nll))
    if gaps and sum(gaps) / len(gaps) > limit:
        raise ForgeError(
            f"the NLL of expected answers differs from evaluation by {sum(gaps) / len(gaps):.3f} nats per token, and "
            f"serving.max_nll_gap is {limit}: the served weights, their precision or their base differ from those that "
            "were evaluated"
        )
