"""An OpenAI-compatible API, as a client of it sees it."""

from typing import Any

from openai import BadRequestError, DefaultHttpxClient, OpenAI


def client_of(endpoint: str) -> OpenAI:
    """A client of the local server, which asks for no key, and to which no proxy leads."""
    direct = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=endpoint, api_key="EMPTY", max_retries=0, timeout=60, http_client=direct)


def chat(
    client: OpenAI,
    name: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    max_tokens: int | None = None,
) -> str:
    """One greedy chat completion, of as many tokens as the context has room for unless told; "" where it has none.

    The model is shown the tools, and what it says is returned as it is: a call is not told from other text.
    """
    shown: dict[str, Any] = {"tools": tools, "tool_choice": "none"} if tools else {}
    try:
        answer = client.chat.completions.create(
            model=name,
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=max_tokens,
            **shown,
        )
    except BadRequestError as error:
        if "maximum context length" in error.message:
            return ""
        raise
    return answer.choices[0].message.content or ""
