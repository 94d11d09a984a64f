"""The formats that rows come in, and their conversion to one: a conversation, or a plain text."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from tasks.preprocess.file_formats import Block
from tasks.preprocess.messages import check_messages, check_tools, reject_media
from tasks.preprocess.rows import (
    EXAMPLE,
    Invalid,
    Row,
    check_column,
    check_judgement,
    check_text,
    parse_list,
    parse_text,
    printable,
)

COMMON = ("system", "tools", "functions")  # columns next to a conversation, in every format
PROBED_BLOCKS = 6  # searched for the first row of a known format
SPEAKERS = {  # of ShareGPT and its variants
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A way to write a row: the columns it is recognised by, optional ones, and how it is converted."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[dict[str, Any]], dict[str, Any]]


def _chat(value: dict[str, Any]) -> dict[str, Any]:
    return {"messages": _with_system(parse_list(value["messages"], "messages"), value), "tools": _tools(value)}


def _sharegpt(value: dict[str, Any]) -> dict[str, Any]:
    messages: Any = []
    turns = parse_list(value["conversations"], "conversations")
    for number, turn in enumerate(turns if isinstance(turns, list) else [None], 1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker is None and isinstance(turn, dict) and turn.get("role") is not None:
            messages.append(turn)
            continue
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise Invalid(
                "unknown role", f"message {number}: from is {speaker!r}; it must be one of {', '.join(SPEAKERS)}"
            )
        text = turn.get("value")
        if speaker == "function_call":
            where = f"message {number} (function_call): value"
            call = parse_text(check_text(text, where), where)
            calls = call if isinstance(call, list) else [call]
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        else:
            message = {"role": SPEAKERS[speaker], "content": text}
        messages.append({name: entry for name, entry in turn.items() if name not in ("from", "value")} | message)
    return {"messages": _with_system(messages, value), "tools": _tools(value)}


def _prompt(value: dict[str, Any]) -> dict[str, Any]:
    if isinstance(value["prompt"], list):  # TRL's conversational format
        prompt, completion = parse_list(value["prompt"], "prompt"), parse_list(value["completion"], "completion")
        messages = [*prompt, *(completion if isinstance(completion, list) else [None])]
        return {"messages": _with_system(messages, value), "tools": _tools(value)}
    return {"messages": _pair(value, "prompt", "completion"), "tools": _tools(value)}


def _alpaca(value: dict[str, Any]) -> dict[str, Any]:
    instruction = check_text(value["instruction"], "instruction")
    if value.get("input"):
        instruction = f"{instruction}\n\n{check_text(value['input'], 'input')}"
    pair = _pair({**value, "instruction": instruction}, "instruction", "output")
    earlier = []
    history = parse_list(value.get("history") or [], "history")
    if not isinstance(history, list):
        raise Invalid("wrong type", "history must be a list of pairs of a question and its answer")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise Invalid("wrong type", f"history, entry {number}: must be a list of a question and its answer")
        earlier += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return {"messages": [*pair[:-2], *earlier, *pair[-2:]], "tools": _tools(value)}


def _text(value: dict[str, Any]) -> dict[str, Any]:
    return {"text": check_text(value["text"], "text")}


def _pair(value: dict[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    """The conversation of two columns, and of the column `system` if it is given."""
    messages = [
        {"role": "user", "content": check_text(value[question], question)},
        {"role": "assistant", "content": check_text(value[answer], answer)},
    ]
    return _with_system(messages, value)


def _with_system(messages: Any, value: dict[str, Any]) -> Any:
    """Messages with that of the column `system` in front, if a row has it."""
    if not value.get("system") or not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") in ("system", "developer"):
        if first.get("content") == value["system"]:
            return messages
        raise Invalid("two system messages", "the row has a system message and another column system; remove one")
    return [{"role": "system", "content": value["system"]}, *messages]


def _tools(value: dict[str, Any]) -> Any:
    """The tools of a row, or the functions that OpenAI's API had before them."""
    if value.get("tools") or not value.get("functions"):
        return value.get("tools")
    functions = parse_list(value["functions"], "functions")
    return (
        [{"type": "function", "function": entry} for entry in functions] if isinstance(functions, list) else functions
    )


# The order decides when a row matches several.
ROW_FORMATS = (
    RowFormat("chat", ("messages",), COMMON, _chat),
    RowFormat("sharegpt", ("conversations",), COMMON, _sharegpt),
    RowFormat("prompt", ("prompt", "completion"), COMMON, _prompt),
    RowFormat("alpaca", ("instruction", "output"), ("input", "history", *COMMON), _alpaca),
    RowFormat("text", ("text",), (), _text),
)


def row_format_named(name: str) -> RowFormat:
    """The format that the recipe gives this name."""
    return next(row_format for row_format in ROW_FORMATS if row_format.name == name)


def detect_row_format(value: Any) -> RowFormat | None:
    """The first format whose required columns a row has, if any."""
    return next((row_format for row_format in ROW_FORMATS if has_columns(value, row_format)), None)


def find_row_format(recipe: DataRecipe, blocks: Iterator[Block]) -> tuple[Iterator[Block], RowFormat, str]:
    """The blocks, the format of their rows, and why: the recipe names it, or the first row of a known format has it."""
    if recipe.row_format != "auto":
        return blocks, row_format_named(recipe.row_format), "the recipe says so"
    probed: list[Block] = []
    for block in islice(blocks, PROBED_BLOCKS):
        probed.append(block)
        for number, value in block.values():
            if not isinstance(value, Invalid) and (row_format := detect_row_format(value)):
                columns = " and ".join(row_format.required)
                reason = f"{block.name}:{number} is {row_format.name} (it has {columns})"
                return chain(probed, blocks), row_format, reason
    return chain(probed, blocks), ROW_FORMATS[0], "no row has a known format"


def has_columns(value: Any, row_format: RowFormat) -> bool:
    """Whether a row has all required columns of a format; a null counts as missing."""
    return isinstance(value, dict) and all(value.get(column) is not None for column in row_format.required)


def other_row_format(value: Any, row_format: RowFormat, recipe: DataRecipe) -> RowFormat | None:
    """The format of a row that differs from the source's, where the recipe leaves the format to be detected.

    Raises Invalid if the value could not be parsed or has no known format.
    """
    if isinstance(value, Invalid):
        raise value
    if recipe.row_format != "auto":
        return None
    detected = detect_row_format(value)
    if detected is None:
        raise _unknown_row_format(value)
    return None if detected is row_format else detected


def to_row(value: Any, row_format: RowFormat, recipe: DataRecipe, ignored: Counter[str], changed: Counter[str]) -> Row:
    """The checked row of a value in a given format.

    `ignored` counts columns that are not used, and `changed` messages that are merged or dropped.

    Raises Invalid with the reason and the fix.
    """
    if not has_columns(value, row_format):
        raise Invalid(
            "not of the shape", f"a row of format {row_format.name} must have {_columns(row_format.required)}"
        )
    used = {
        *row_format.required, *row_format.optional, recipe.group_column, recipe.slice_column, recipe.check_column
    }  # fmt: skip
    for column in value:
        if column not in used:
            ignored[printable(column)] += 1
    reject_media(value, "the row")
    converted = row_format.convert(value)
    text = converted.get("text")
    messages: list[dict[str, Any]] = []
    untrained: tuple[int, ...] = ()
    if text is None:
        messages, untrained = check_messages(converted["messages"], recipe.turns, ignored, changed)
    tools = check_tools(converted.get("tools"))
    group, part = value.get(recipe.group_column), value.get(recipe.slice_column)
    judged = value.get(recipe.check_column)
    return Row(
        messages,
        tools,
        text,
        group=check_column(group, recipe.group_column) if group is not None else prompt_of(messages, text),
        slice=check_column(part, recipe.slice_column) if part is not None else "all",
        check=check_judgement(judged, recipe.check_column) if judged is not None else "",
        untrained=untrained,
    )


def prompt_of(messages: list[dict[str, Any]], text: str | None) -> str:
    """The first question, lower case and with single spaces: conversations that begin alike belong to one group."""
    prompt = text if text is not None else next(m["content"] for m in messages if m["role"] == "user")
    return " ".join(prompt.lower().split())


def mixed_row_formats(where: str, other: str, reason: str) -> ForgeError:
    """The error for a source whose rows have two formats; `reason` says which one the first row has."""
    return ForgeError(
        f"two row formats in one source: {where} is {other}, and {reason}",
        where="data",
        fix="put them in separate sources, or set data.row_format to reject the others",
    )


def _unknown_row_format(value: Any) -> Invalid:
    if not isinstance(value, dict):
        return Invalid("no conversation", f"no conversation: a row must be a JSON object: {EXAMPLE}")
    known = "; ".join(f"{_columns(row_format.required)} ({row_format.name})" for row_format in ROW_FORMATS)
    return Invalid(
        "no conversation", f"no conversation: the columns are {_columns(value) or 'none'}; a row must have {known}"
    )


def _columns(names: Iterable[str]) -> str:
    return " and ".join(list(names)[:8])
