"""The proof over the API: the served model must answer as evaluation said it does."""

import json
from pathlib import Path

from openai import OpenAIError
from pyarrow import parquet

from tasks.endpoint import ask, client_of
from tasks.errors import ForgeError


def prove(endpoint: str, name: str, evaluation: Path, count: int, min_agreement: float) -> str:
    """Ask `count` evaluated prompts again over the API; returns "16 of 16" or so.

    Raises ForgeError where the model is not listed, a request fails, or too few answers are those of evaluation.
    """
    card = json.loads((evaluation / "evaluation.json").read_text())
    columns = ["messages", "tools", "candidate_answer"]
    rows = parquet.read_table(evaluation / "items.parquet", columns=columns).to_pylist()
    items = [(json.loads(row["messages"]), row["candidate_answer"]) for row in rows[:count]]
    tools = [json.loads(row["tools"] or "null") for row in rows[:count]]
    client = client_of(endpoint)
    try:
        served = [model.id for model in client.models.list()]
        if name not in served:
            raise ForgeError(f"the server at {endpoint} serves {', '.join(served)}, not {name}")
        most = card["recipe"]["max_new_tokens"]
        answers = [ask(client, name, messages, its, most) for (messages, _), its in zip(items, tools, strict=True)]
    except OpenAIError as error:
        raise ForgeError(f"the server at {endpoint} did not answer: {error}") from None
    # Strip as evaluation's own comparison does: white space at the ends is not told apart.
    pairs = [(messages, said, now) for (messages, said), now in zip(items, answers, strict=True)]
    differing = [pair for pair in pairs if pair[1].strip() != pair[2].strip()]
    agreeing = len(items) - len(differing)
    if agreeing < min_agreement * len(items):
        messages, said, now = differing[0]
        raise ForgeError(
            f"the served model does not answer as it did in evaluation: {agreeing} of {len(items)} answers agree, and "
            f"serving.min_agreement is {min_agreement}. Asked {messages[-1]['content']!r} it answered {now!r}, in "
            f"evaluation {said!r}"
        )
    return f"{agreeing} of {len(items)}"
