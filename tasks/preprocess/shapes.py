"""The shapes that rows come in, and their conversion into one: a conversation, or a plain text."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from forge.core.recipe import DataRecipe
from tasks.preprocess.formats import Block
from tasks.preprocess.rows import (
    EXAMPLE,
    Invalid,
    Row,
    check_column,
    check_judgement,
    check_messages,
    check_text,
    check_tools,
    parse,
    printable,
)

LOOKED_AT = 6  # blocks, in search of a row that is of any shape
SPEAKERS = {
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
    """A way to write a row: the columns that tell it, those it may also have, and how it is read."""

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    convert: Callable[[dict[str, Any]], dict[str, Any]]


def _chat(value: dict[str, Any]) -> dict[str, Any]:
    return {"messages": _listed(value["messages"]), "tools": value.get("tools")}


def _sharegpt(value: dict[str, Any]) -> dict[str, Any]:
    messages: Any = []
    turns = _listed(value["conversations"])
    for number, turn in enumerate(turns if isinstance(turns, list) else [None], 1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise Invalid(
                "unknown role", f"message {number}: from is {speaker!r}; it must be one of {', '.join(SPEAKERS)}"
            )
        said = turn.get("value")
        if speaker == "function_call":
            call = parse(check_text(said, f"message {number} (function_call): value").encode("utf-8", "surrogatepass"))
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": call if isinstance(call, list) else [call]}
            )
        else:
            messages.append({"role": SPEAKERS[speaker], "content": said})
    if value.get("system"):
        messages.insert(0, {"role": "system", "content": value["system"]})
    return {"messages": messages, "tools": value.get("tools")}


def _prompt(value: dict[str, Any]) -> dict[str, Any]:
    if isinstance(value["prompt"], list):  # conversations, as TRL has them
        completion = value["completion"] if isinstance(value["completion"], list) else [None]
        return {"messages": [*value["prompt"], *completion], "tools": value.get("tools")}
    return {"messages": _pair(value["prompt"], value["completion"], "prompt", "completion", value.get("system"))}


def _alpaca(value: dict[str, Any]) -> dict[str, Any]:
    instruction = check_text(value["instruction"], "instruction")
    if value.get("input"):
        instruction = f"{instruction}\n\n{check_text(value['input'], 'input')}"
    return {"messages": _pair(instruction, value["output"], "instruction", "output", value.get("system"))}


def _text(value: dict[str, Any]) -> dict[str, Any]:
    return {"text": check_text(value["text"], "text")}


def _pair(question: Any, answer: Any, asked: str, answered: str, system: Any) -> list[dict[str, Any]]:
    messages = [
        {"role": "user", "content": check_text(question, asked)},
        {"role": "assistant", "content": check_text(answer, answered)},
    ]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _listed(value: Any) -> Any:
    """A list, or its JSON text (as CSV has it)."""
    return parse(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else value


# The order decides where a row could be more than one.
SHAPES = (
    RowFormat("chat", ("messages",), ("tools",), _chat),
    RowFormat("sharegpt", ("conversations",), ("system", "tools"), _sharegpt),
    RowFormat("prompt", ("prompt", "completion"), ("system", "tools"), _prompt),
    RowFormat("alpaca", ("instruction", "output"), ("input", "system"), _alpaca),
    RowFormat("text", ("text",), (), _text),
)


def shape_named(name: str) -> RowFormat:
    """The shape of a name of the recipe."""
    return next(shape for shape in SHAPES if shape.name == name)


def detect(value: Any) -> RowFormat | None:
    """The first shape whose columns a row has; None where there is none."""
    return next((shape for shape in SHAPES if has(value, shape)), None)


def find_row_format(recipe: DataRecipe, blocks: Iterator[Block]) -> tuple[Iterator[Block], RowFormat, str]:
    """The blocks, the shape of their rows and the reason: the recipe's word, or the first row that is of any shape."""
    if recipe.row_format != "auto":
        return blocks, shape_named(recipe.row_format), "the recipe says so"
    seen: list[Block] = []
    for block in islice(blocks, LOOKED_AT):
        seen.append(block)
        for number, value in block.values():
            if not isinstance(value, Invalid) and (shape := detect(value)):
                reason = f"{block.name}:{number} is {shape.name} (it has {' and '.join(shape.needs)})"
                return chain(seen, blocks), shape, reason
    return chain(seen, blocks), SHAPES[0], "no row is of any shape"


def has(value: Any, shape: RowFormat) -> bool:
    """Whether a row has a shape's columns (a column that holds null is not there)."""
    return isinstance(value, dict) and all(value.get(column) is not None for column in shape.needs)


def to_row(value: Any, shape: RowFormat, recipe: DataRecipe, ignored: Counter[str]) -> Row:
    """The row that a value of a shape holds, checked; `ignored` counts columns that are not used.

    Raises Invalid with the reason and the mend.
    """
    if not has(value, shape):
        raise Invalid("not of the shape", f"a row of shape {shape.name} must have {_columns(shape.needs)}")
    used = {*shape.needs, *shape.takes, recipe.group_column, recipe.slice_column, recipe.check_column}
    for column in value:
        if column not in used:
            ignored[printable(column)] += 1
    converted = shape.convert(value)
    text = converted.get("text")
    messages = [] if text is not None else check_messages(converted["messages"], ignored)
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
    )


def prompt_of(messages: list[dict[str, Any]], text: str | None) -> str:
    """What is asked first, with case and spacing evened out: conversations that begin alike belong to one group."""
    asked = text if text is not None else next(m["content"] for m in messages if m["role"] == "user")
    return " ".join(asked.lower().split())


def unknown_shape(value: Any) -> Invalid:
    """The refusal of a row that is of no shape."""
    if not isinstance(value, dict):
        return Invalid("no conversation", f"no conversation: a row must be a JSON object: {EXAMPLE}")
    known = "; ".join(f"{_columns(shape.needs)} ({shape.name})" for shape in SHAPES)
    return Invalid(
        "no conversation", f"no conversation: the columns are {_columns(value) or 'none'}; a row must have {known}"
    )


def _columns(names: Iterable[str]) -> str:
    return " and ".join(list(names)[:8])
