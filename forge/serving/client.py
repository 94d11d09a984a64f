"""Asking a served model through its OpenAI-compatible API."""

from typing import Any

from openai import BadRequestError, DefaultHttpxClient, OpenAI

from forge.serving.vllm_client import as_server_reads


def client_of(endpoint: str) -> OpenAI:
    """A client of our own server, which needs no key and is not behind a proxy."""
    direct = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=endpoint, api_key="EMPTY", max_retries=0, timeout=60, http_client=direct)


def chat(
    client: OpenAI,
    name: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    max_tokens: int | None = None,
) -> str:
    """One greedy chat completion, up to the end of the context unless `max_tokens` is given; "" if the prompt fills it.

    `tools` are part of the prompt. Tool calls are returned as text, unparsed.
    """
    shown: dict[str, Any] = {"tools": tools, "tool_choice": "none"} if tools else {}
    try:
        answer = client.chat.completions.create(
            model=name,
            messages=as_server_reads(messages),  # type: ignore[arg-type]
            temperature=0,
            max_tokens=max_tokens,
            **shown,
        )
    except BadRequestError as error:
        if "maximum context length" in error.message:
            return ""
        raise
    return answer.choices[0].message.content or ""
