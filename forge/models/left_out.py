"""What a chat template leaves out of a row: a row is rejected unless its rendering has each message whole.

`markup` matches control tokens and the tags of reasoning. A text of a row that is found in their names does not count.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from forge.models.chat_format import Messages, TemplateError, Tools

THINK = re.compile(r"</?think>")
SHORT = 8  # characters of a text that may be within the name of a control token


def check_context(messages: Messages, tools: Tools, text: str, markup: re.Pattern[str]) -> None:
    """Raise TemplateError if the template left out tools, or what the model should read of a message.

    Earlier reasoning may be left out: the model does not read it either.
    """
    if any(not _shows(text, str(tool.get("function", tool).get("name", ""))) for tool in tools or []):
        raise left_out("tools")
    for message in messages:
        kind = "tool results" if message["role"] == "tool" else f"{message['role']} message"
        shown = message["content"].strip()
        if message["role"] == "assistant":
            shown = THINK.split(shown)[-1].strip()
        where = text
        if len(shown) <= SHORT:
            where, shown = markup.sub("", text), markup.sub("", shown)
        if not _shows(where, shown):
            raise left_out("text next to tool calls" if "tool_calls" in message else kind)
        if "tool_calls" in message and (missing := missing_calls(message["tool_calls"], text, True)):
            raise left_out(missing)


def missing_part(message: dict[str, Any], turn: str, markup: re.Pattern[str]) -> str:
    """What a turn lacks of its message; "" if it is whole."""
    words = markup.sub("", turn)  # so that no text is found in the name of a control token
    reasoning = markup.sub("", message.get("reasoning_content", "")).strip()
    parts = [markup.sub("", part).strip() for part in THINK.split(message["content"])]
    if _after(words, reasoning) is None or not _shows(turn, message.get("reasoning_content", "").strip()):
        return "reasoning_content"
    if _after(words, reasoning, *parts) is None:
        if _after(words, *parts) is not None:  # the reasoning was found in the content alone
            return "reasoning_content"
        return "text next to tool calls" if "tool_calls" in message else "assistant message"
    return missing_calls(message["tool_calls"], turn) if "tool_calls" in message else ""


def missing_calls(calls: Sequence[dict[str, Any]], text: str, as_context: bool = False) -> str:
    """What a text lacks of calls; "" if they are whole. As context, they may have any form."""
    if _after(text, *(call["function"]["name"] for call in calls)) is None:
        return "tool calls"
    for call in calls:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, dict):
            arguments = json.loads(arguments)
        if not all(_shows(text, word) for word in _words(arguments)):
            return "arguments of tool calls"
        if not as_context and arguments and str(arguments) in text and as_json(arguments) not in text:
            return "arguments of tool calls as JSON: it writes them as Python does"
    return ""


def as_json(value: Any) -> str:
    """A value as JSON, as templates write it."""
    return json.dumps(value, ensure_ascii=False)


def _words(value: Any) -> Iterator[str]:
    """All keys and values within a JSON value, as text."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from _words(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _words(entry)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _after(text: str, *parts: str) -> str | None:
    """What follows in a text after others, which it holds one after the other, as they are or as they are in JSON.

    None if it does not hold them so.
    """
    for part in parts:
        found = next(((at, len(form)) for form in _forms(part) if (at := text.find(form)) >= 0), None)
        if found is None:
            return None
        text = text[sum(found) :]
    return text


def _forms(part: str) -> Iterator[str]:
    yield part
    yield as_json(part)[1:-1]
    yield json.dumps(part)[1:-1]


def _shows(text: str, part: str) -> bool:
    """Whether a text holds another, as it is or as it is in JSON."""
    return part in text or _after(text, part) is not None


def left_out(what: str) -> TemplateError:
    """The error of a row of which the template leaves something out."""
    return TemplateError("chat template", f"the chat template leaves out the row's {what}; use one that renders them")
