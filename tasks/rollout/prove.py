"""The proof over the API: the served model must answer as evaluation said it does."""

import json
from pathlib import Path

from openai import DefaultHttpxClient, OpenAI, OpenAIError

from tasks.errors import ForgeError


def client_of(endpoint: str) -> OpenAI:
    """A client of the local server, which asks for no key, and to which no proxy leads."""
    direct = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=endpoint, api_key="EMPTY", max_retries=0, timeout=60, http_client=direct)


def ask(client: OpenAI, name: str, messages: list[dict[str, str]], max_tokens: int | None = None) -> str:
    """One greedy chat completion, of as many tokens as the context has room for unless told."""
    answer = client.chat.completions.create(
        model=name,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=max_tokens,
    )
    return answer.choices[0].message.content or ""


def prove(endpoint: str, name: str, evaluation: Path, count: int, min_agreement: float) -> str:
    """Ask `count` evaluated prompts again over the API; returns "16 of 16" or so.

    Raises ForgeError where the model is not listed, a request fails, or too few answers are those of evaluation.
    """
    card = json.loads((evaluation / "evaluation.json").read_text())
    with (evaluation / "items.jsonl").open(encoding="utf-8") as lines:
        items = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    client = client_of(endpoint)
    try:
        served = [model.id for model in client.models.list()]
        if name not in served:
            raise ForgeError(f"the server at {endpoint} serves {', '.join(served)}, not {name}")
        answers = [ask(client, name, item["messages"], card["recipe"]["max_new_tokens"]) for item in items]
    except OpenAIError as error:
        raise ForgeError(f"the server at {endpoint} did not answer: {error}") from None
    # Strip as evaluation's own comparison does: white space at the ends is not told apart.
    differing = [(i, a) for i, a in zip(items, answers, strict=True) if i["answer"].strip() != a.strip()]
    agreeing = len(items) - len(differing)
    if agreeing < min_agreement * len(items):
        item, answer = differing[0]
        raise ForgeError(
            f"the served model does not answer as it did in evaluation: {agreeing} of {len(items)} answers agree, and "
            f"serving.min_agreement is {min_agreement}. Asked {item['messages'][-1]['content']!r} it answered "
            f"{answer!r}, in evaluation {item['answer']!r}"
        )
    return f"{agreeing} of {len(items)}"
