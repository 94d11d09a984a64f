"""What a row must look like. Every rejection has a reason to count by, and a message that says how to fix the row."""

import codecs
import hashlib
import json
import math
import reprlib
import sys
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError

from forge.core.errors import printable
from forge.core.recipe import Check

EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
DEEP = "JSON that is nested too deeply; simplify the row"
HALF = "half a character (a lone surrogate)"
EACH_LINE = f"; each line must be one complete row: {EXAMPLE}"
LONGEST = 2000  # characters of a message, since a row's names and values can have any length
_SHORT = reprlib.Repr()
_SHORT.maxstring = 100


class Invalid(Exception):
    """Why a row is rejected: `reason` is a short name to count by, `message` says what to do about it."""

    def __init__(self, reason: str, message: str) -> None:
        message = printable(message if len(message) <= LONGEST else f"{message[:LONGEST]}...")
        super().__init__(reason, message)
        self.reason, self.message = reason, message


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation (`messages`, and the `tools` it may call) or one plain `text`.

    `untrained` are the indices of assistant messages that are only read, and `check` is how an answer is scored, as
    JSON.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    text: str | None
    group: str
    slice: str
    check: str = ""
    untrained: tuple[int, ...] = ()

    @property
    def content(self) -> dict[str, Any]:
        """What the model learns from, as JSON."""
        if self.text is not None:
            return {"text": self.text}
        content: dict[str, Any] = {"messages": self.messages}
        if self.tools:
            content["tools"] = self.tools
        if self.untrained:
            content["untrained"] = list(self.untrained)
        return content

    def texts(self) -> list[str]:
        """All text in the row; tool calls and tools as JSON."""
        if self.text is not None:
            return [self.text]
        texts = [message["content"] for message in self.messages]
        for message in self.messages:
            if len(message) > 2:
                texts += [_as_text(value) for value in list(message.values())[2:]]
        return texts + ([_as_text(self.tools)] if self.tools else [])


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value).decode()


def canonical(value: Any) -> bytes:
    """A value's JSON with keys in their given order, as a template would write it; Invalid if it can't be encoded."""
    try:
        return orjson.dumps(value)
    except TypeError as error:
        if "surrogate" in str(error):
            raise Invalid("lone surrogate", f"a text holds {HALF}; fix the program that wrote the row") from None
        if "64-bit" in str(error):
            raise Invalid("not JSON", "an integer of more than 64 bits cannot be stored; write it as text") from None
        raise Invalid("not JSON", f"JSON that cannot be stored ({error}); simplify the row") from None


def digests(row: Row) -> tuple[bytes, bytes]:
    """Two digests of 16 bytes: of the content, and of the content with its columns (the key that rows are sorted by).

    Raises Invalid if a text cannot be encoded.
    """
    content = hashlib.blake2b(canonical(row.content), digest_size=16).digest()
    return content, hashlib.blake2b(
        content + canonical([row.group, row.slice, *([row.check] if row.check else [])]), digest_size=16
    ).digest()


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Invalid("duplicate key", f"the key {shown(twice)} appears twice in one object; remove one")
    return value


def _no_constant(name: str) -> Any:
    raise Invalid("not a number", f"{name} is not valid JSON; write a number or null")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise Invalid("not a number", f"{number[:20]} is too large for a number; write it as text")
    return value


def parse(line: bytes) -> Any:
    """The JSON value of a line; Invalid says what is wrong with it."""
    if line.startswith(codecs.BOM_UTF8):
        raise Invalid("byte order mark", "the line starts with a byte order mark; save it as UTF-8 without one")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid("not UTF-8", f"not UTF-8 text (byte {error.start + 1}); convert the file to UTF-8") from None
    if not text.strip():
        raise Invalid("empty line", "the line is empty; remove it")
    try:
        return json.loads(text, object_pairs_hook=_no_duplicate_keys, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        what = f"not valid JSON ({error.msg} at column {error.colno})"
        raise Invalid("not JSON", what + EACH_LINE) from None
    except RecursionError:
        raise Invalid("not JSON", "JSON that cannot be read: it is nested too deeply; simplify the row") from None
    except ValueError:  # of int
        digits = sys.get_int_max_str_digits()
        raise Invalid(
            "not JSON", f"JSON that cannot be read: an integer has more than {digits} digits; write it as text"
        ) from None


def parse_text(text: str, what: str) -> Any:
    """The value of JSON inside a string, checked as a line is; `what` names it in the Invalid."""
    if not text.strip():
        raise Invalid("empty content", f"{what} must not be empty")
    try:
        return parse(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise Invalid("lone surrogate", f"{what} holds {HALF}; fix the program that wrote the row") from None
    except Invalid as invalid:
        raise Invalid(invalid.reason, f"{what}: {invalid.message.removesuffix(EACH_LINE)}") from None


def parse_list(value: Any, what: str) -> Any:
    """A list; or its JSON text, as in CSV; or a list of JSON texts, as in Parquet files of Hugging Face's datasets."""
    if isinstance(value, str):
        value = parse_text(value, what)
    if not isinstance(value, list):
        return value
    return [
        parse_text(entry, f"{what}, entry {number}") if isinstance(entry, str) and entry.lstrip()[:1] == "{" else entry
        for number, entry in enumerate(value, 1)
    ]


def without_nulls(value: Any) -> Any:
    """A value without the nulls in its objects: Arrow gives each object every key that any of them has.

    Raises Invalid if it is nested too deeply.
    """
    try:
        return _without_nulls(value)
    except RecursionError:
        raise Invalid("not JSON", DEEP) from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def json_of(value: Any, what: str) -> Any:
    """A value without the nulls in its objects, as JSON can write it; `what` names it in the Invalid.

    Parquet has numbers, dates and bytes that JSON has not, and a template or a digest would change them in silence.
    """
    try:
        value = _without_nulls(value)
        _check_json(value, what)
    except RecursionError:
        raise Invalid("not JSON", f"{what}: {DEEP}") from None
    return value


def _check_json(value: Any, what: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise Invalid("wrong type", f"{what} must have keys that are strings, not {_kind(key)}")
            _check_json(entry, what)
    elif isinstance(value, list):
        for entry in value:
            _check_json(entry, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Invalid("not a number", f"{what} must not hold {value}; write a number or null")
    elif value is not None and not isinstance(value, str | int | float):
        raise Invalid("wrong type", f"{what} must not hold {_kind(value)}; write it as text")


def check_text(value: Any, what: str) -> str:
    """The value, if it is a non-empty string."""
    if not isinstance(value, str):
        raise Invalid("wrong type", f"{what} must be a string, not {_kind(value)}")
    if not value.strip():
        raise Invalid("empty content", f"{what} must not be empty")
    return value


def shown(value: Any) -> str:
    """A value as a message names it, shortened."""
    return _SHORT.repr(value)


def check_judgement(value: Any, name: str) -> str:
    """How a row's answer is scored, as JSON: a kind of `Check`, or an object (or its JSON text) with its fields."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_text(value, name)
    value = {"kind": value} if isinstance(value, str) else without_nulls(value)
    try:
        return canonical(Check.model_validate(value).model_dump(exclude_defaults=True)).decode()
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([name, *(str(part) for part in problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        raise Invalid(
            "bad check", f'{where}: {message}; write "exact", or {{"kind": "number", "tolerance": 0.01}}'
        ) from None


def check_column(value: Any, name: str) -> str:
    """The value of a group or slice column, as text."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        what = "a number with a point" if isinstance(value, float) else _kind(value)
        raise Invalid("wrong type", f"{name} must be a string or an integer, not {what}")
    return str(value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
