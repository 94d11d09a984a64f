"""The formats that rows come in, and their conversion to one: a conversation, or a plain text."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from forge.core.errors import ForgeError, printable
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
    shown,
)

SYSTEM = ("system", "system_prompt")
COMMON = (*SYSTEM, "tools", "functions")  # columns next to a conversation, in every format
MESSAGES = re.compile(r'\s*\[\s*\{\s*"(role|content)"\s*:')  # how the JSON of a list of messages begins
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
    """A way to write a row: the columns it is recognised by, optional ones, and how they become messages or a text."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[dict[str, Any]], Any]


def _chat(value: dict[str, Any]) -> Any:
    return parse_list(value["messages"], "messages")


def _sharegpt(value: dict[str, Any]) -> Any:
    messages: Any = []
    turns = parse_list(value["conversations"], "conversations")
    for number, turn in enumerate(turns if isinstance(turns, list) else [None], 1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker is None and isinstance(turn, dict) and turn.get("role") is not None:
            messages.append(turn)
            continue
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise Invalid(
                "unknown role", f"message {number}: from is {shown(speaker)}; it must be one of {', '.join(SPEAKERS)}"
            )
        text = turn.get("value")
        where = f"message {number} ({speaker}): value"
        if turn.get("content") not in (None, text):
            raise Invalid("two contents", f"{where} and content differ; remove one")
        if turn.get("role") not in (None, speaker, SPEAKERS[speaker]):
            raise Invalid("unknown role", f"message {number}: from and role differ; remove one")
        if speaker == "function_call":
            call = parse_text(check_text(text, where), where)
            calls = call if isinstance(call, list) else [call]
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        elif text is None and not turn.get("tool_calls"):
            raise Invalid("wrong type", f"{where} must be a string, not missing")
        else:
            message = {"role": SPEAKERS[speaker], "content": text}
        messages.append({name: entry for name, entry in turn.items() if name not in ("from", "value")} | message)
    return messages


def _prompt(value: dict[str, Any]) -> Any:
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(prompt, list) and not (_is_messages(prompt) and _is_messages(completion)):
        return [*_history(value), *_pair("prompt", prompt, "completion", completion)]
    if value.get("history"):
        raise Invalid("two conversations", "prompt is a list of messages, and so is history; write them as one")
    prompt, completion = parse_list(prompt, "prompt"), parse_list(completion, "completion")  # TRL's conversations
    return [*prompt, *(completion if isinstance(completion, list) else [None])]


def _is_messages(value: Any) -> bool:
    """Whether a text is the JSON of a list of messages, as in CSV."""
    return isinstance(value, str) and MESSAGES.match(value) is not None


def _alpaca(value: dict[str, Any]) -> Any:
    instruction = check_text(value["instruction"], "instruction")
    given = value.get("input")
    if given and not (isinstance(given, str) and given.isspace()):
        instruction = f"{instruction}\n\n{check_text(given, 'input')}"
    return [*_history(value), *_pair("instruction", instruction, "output", value["output"])]


def _history(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of the column `history`: earlier pairs of a question and its answer."""
    messages = []
    history = parse_list(value.get("history") or [], "history")
    if not isinstance(history, list):
        raise Invalid("wrong type", "history must be a list of pairs of a question and its answer")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise Invalid("wrong type", f"history, entry {number}: must be a list of a question and its answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _text(value: dict[str, Any]) -> Any:
    return check_text(value["text"], "text")


def _pair(question: str, asked: Any, answer: str, answered: Any) -> list[dict[str, Any]]:
    """The conversation of two columns, given by name and value."""
    return [
        {"role": "user", "content": check_text(asked, question)},
        {"role": "assistant", "content": check_text(answered, answer)},
    ]


def _system(value: dict[str, Any], messages: Any) -> list[dict[str, Any]]:
    """The message of the column `system` or `system_prompt`, if a row has it and its messages do not begin with it."""
    given = [value[column] for column in SYSTEM if value.get(column)]
    if not given or not isinstance(messages, list) or not messages:
        return []
    first = messages[0] if isinstance(messages[0], dict) else {}
    has_system = first.get("role") in ("system", "developer")
    if any(entry != given[0] for entry in given):
        raise Invalid("two system messages", f"the columns {' and '.join(SYSTEM)} differ; remove one")
    if has_system and first.get("content") != given[0]:
        raise Invalid("two system messages", "the row has a system message and another column system; remove one")
    return [] if has_system else [{"role": "system", "content": given[0]}]


def _tools(value: dict[str, Any]) -> Any:
    """The tools of a row, or the functions that OpenAI's API had before them."""
    if not value.get("functions"):
        return value.get("tools")
    if value.get("tools"):
        raise Invalid("tool calls", "the row has tools and functions; remove one")
    functions = parse_list(value["functions"], "functions")
    return (
        [{"type": "function", "function": entry} for entry in functions] if isinstance(functions, list) else functions
    )


# The order decides when a row matches several.
ROW_FORMATS = (
    RowFormat("chat", ("messages",), COMMON, _chat),
    RowFormat("sharegpt", ("conversations",), COMMON, _sharegpt),
    RowFormat("prompt", ("prompt", "completion"), ("history", *COMMON), _prompt),
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
    """Whether a row has all required columns of a format."""
    return isinstance(value, dict) and all(_filled(value, column) for column in row_format.required)


def _filled(value: dict[str, Any], column: str) -> bool:
    """Whether a row has a column. A null or an empty text is as good as none: CSV cannot tell them apart."""
    entry = value.get(column)
    return entry is not None and entry != ""


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
        raise _unknown_row_format(value, row_format)
    return None if detected is row_format else detected


def to_row(value: Any, row_format: RowFormat, recipe: DataRecipe, ignored: Counter[str], changed: Counter[str]) -> Row:
    """The checked row of a value in a given format.

    `ignored` counts columns that are not used, and `changed` messages that are merged or dropped.

    Raises Invalid with the reason and the fix; such a row is not counted.
    """
    if not has_columns(value, row_format):
        raise Invalid(
            "not of the shape",
            f"a row of format {row_format.name} must have {_columns(row_format.required)}; {_found(value)}",
        )
    group, part, check = recipe.group_column, recipe.slice_column, recipe.check_column
    used = {*row_format.required, *row_format.optional, group, part, check}
    unused: Counter[str] = Counter()
    for column in value:
        if column not in used and _filled(value, column):
            unused[printable(column)] += 1
    merged: Counter[str] = Counter()
    reject_media(value, "the row")
    if "weight" not in used and value.get("weight") not in (None, 1):
        raise Invalid(
            "weight of a row",
            f"the row has a weight of {shown(value['weight'])}, and rows are not weighted; remove the key, or the row",
        )
    converted = row_format.convert(value)
    text: str | None = None
    messages: list[dict[str, Any]] = []
    untrained: tuple[int, ...] = ()
    tools = None
    if row_format.name == "text":
        text = converted
    else:
        system = _system(value, converted)
        if system:
            converted = [*system, *converted]
        messages, untrained = check_messages(converted, recipe.turns, unused, merged, 0 if system else 1)
        tools = check_tools(_tools(value), unused)
    row = Row(
        messages,
        tools,
        text,
        group=check_column(value[group], group) if _filled(value, group) else prompt_of(messages, text),
        slice=check_column(value[part], part) if _filled(value, part) else "all",
        check=check_judgement(value[check], check) if _filled(value, check) else "",
        untrained=untrained,
    )
    ignored.update(unused)
    changed.update(merged)
    return row


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


def _unknown_row_format(value: Any, expected: RowFormat) -> Invalid:
    if not isinstance(value, dict):
        return Invalid("no conversation", f"no conversation: a row must be a JSON object: {EXAMPLE}")
    for row_format in (expected, *ROW_FORMATS):
        missing = [column for column in row_format.required if not _filled(value, column)]
        if len(missing) < len(row_format.required):
            return Invalid(
                "no conversation",
                f"no conversation: {_columns(missing)} must not be empty; a row of format {row_format.name} must have "
                f"{_columns(row_format.required)}",
            )
    known = "; ".join(f"{_columns(row_format.required)} ({row_format.name})" for row_format in ROW_FORMATS)
    return Invalid("no conversation", f"no conversation: {_found(value)}; a row must have {known}")


def _found(value: Any) -> str:
    if not isinstance(value, dict):
        return "it is not a JSON object"
    filled = [printable(column) for column in value if _filled(value, column)]
    return f"the columns are {_columns(filled) or 'empty'}"


def _columns(names: Iterable[str]) -> str:
    return " and ".join(list(names)[:8])
