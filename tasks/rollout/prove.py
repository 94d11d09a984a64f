"""The proof over the API: the served model must answer as evaluation said it does, and be given the same tokens."""

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
    """The first evaluated prompts, with what the candidate answered, how likely it found the expected answer, and the
    tokens that it was given (None where its template tells the date).
    """
    rows = parquet.read_table(evaluation / "items.parquet", columns=COLUMNS).to_pylist()[:count]
    parsed = {"messages": lambda text: json.loads(text), "tools": lambda text: json.loads(text or "null")}
    return [{name: parsed.get(name, lambda value: value)(value) for name, value in row.items()} for row in rows]


def prove(
    endpoint: str,
    versioned: str,
    evaluation: Path | None,
    recipe: ServingRecipe,
    check: Callable[[], None] = lambda: None,
) -> str:
    """Ask evaluated prompts again over the API, under the versioned name; returns "16 of 16" or so.

    Raises ForgeError where the model is not listed, a request fails, prompts reach it as other tokens than in
    evaluation, too few answers are those of evaluation, or expected answers are not as likely. Without an evaluation,
    it need only answer; that returns "". `check` raises what ends the proof early.
    """
    client, vllm = client_of(endpoint), VLLM(endpoint.removesuffix("/v1"))
    try:
        served = [model.id for model in client.models.list()]
        if versioned not in served:
            raise ForgeError(f"the server at {endpoint} serves {', '.join(served)}, not {versioned}")
        if evaluation is None:
            chat(client, versioned, HELLO, max_tokens=8)
            return ""
        rows = read_replay(evaluation, recipe.replay)
        most = json.loads((evaluation / "evaluation.json").read_text())["recipe"]["max_new_tokens"]
        _same_tokens(vllm, versioned, _checked(rows, check))
        answers = [chat(client, versioned, row["messages"], row["tools"], most) for row in _checked(rows, check)]
        agreement = _same_answers(rows, answers, recipe.min_agreement)
        _as_likely(vllm, versioned, _checked(rows, check), recipe.max_nll_gap)
        return agreement
    except (OpenAIError, *UNREACHABLE) as error:
        raise ForgeError(f"the server at {endpoint} did not answer: {error}") from None


def _checked(rows: list[dict[str, Any]], check: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """The rows, with a check before each."""
    for row in rows:
        check()
        yield row


def _same_tokens(vllm: VLLM, versioned: str, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        expected = row["prompt_tokens"]
        if not expected:  # refused by the template, or a template that tells the date
            continue
        found = vllm.tokens(versioned, row["messages"], row["tools"])
        if found != expected:
            at = next((at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
            where = f"from token {at} on" if at is not None else f"{len(found)} tokens in place of {len(expected)}"
            raise ForgeError(
                f"the served model is given other tokens than in evaluation ({where}), when asked "
                f"{row['messages'][-1]['content']!r}: its chat template or its tokenizer is not the one that it was "
                "evaluated with"
            )


def _same_answers(rows: list[dict[str, Any]], answers: list[str], min_agreement: float) -> str:
    # Strip as evaluation's own comparison does: white space at the ends is not told apart.
    differing = [
        (row, now) for row, now in zip(rows, answers, strict=True) if row["candidate_answer"].strip() != now.strip()
    ]
    agreeing = len(rows) - len(differing)
    if agreeing < min_agreement * len(rows):
        row, now = differing[0]
        raise ForgeError(
            f"the served model does not answer as it did in evaluation: {agreeing} of {len(rows)} answers agree, and "
            f"serving.min_agreement is {min_agreement}. Asked {row['messages'][-1]['content']!r} it answered {now!r}, "
            f"in evaluation {row['candidate_answer']!r}"
        )
    return f"{agreeing} of {len(rows)}"


def _as_likely(vllm: VLLM, versioned: str, rows: Iterable[dict[str, Any]], limit: float) -> None:
    gaps = []
    for row in rows:
        nll = row["candidate_nll"]
        if row["scored"] and nll is not None and nll == nll:
            gaps.append(abs(vllm.prompt_nll(versioned, row["whole_tokens"], row["scored"]) - nll))
    if gaps and sum(gaps) / len(gaps) > limit:
        raise ForgeError(
            f"the served model finds expected answers {sum(gaps) / len(gaps):.3f} nats a token more or less likely "
            f"than in evaluation, and serving.max_nll_gap is {limit}: its weights, its precision or its base are not "
            "the ones that were evaluated"
        )
