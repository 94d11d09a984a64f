"""Where raw rows come from, and what a row must be. Every finding names the file, the line and the mend."""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import ForgeError, Problems
from tasks.preprocess import demonstration
from tasks.recipe import DataRecipe
from tasks.storage import digest_file, digest_json

DEMONSTRATION = "demonstration"
SHOWN = 10  # findings printed; all are counted
ROLES = ("system", "user", "assistant")
EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation; `where` is its file and line."""

    messages: list[dict[str, str]]
    group: str
    slice: str
    where: str


class Invalid(Exception):
    """Why a row is refused."""


def find_files(source: str) -> list[Path]:
    """The JSONL files of a path, sorted; ForgeError if there are none or they are empty."""
    path = Path(source.removeprefix("file://"))
    if "://" in str(source) and not source.startswith("file://"):
        raise ForgeError(f"data {source}: only local paths can be read; copy the rows here and give their path")
    if not path.exists():
        raise ForgeError(f"data {path}: no such file or directory; give the path of a JSONL file of conversations")
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ForgeError(f"data {path}: the directory holds no *.jsonl file; put the conversations there as JSONL")
    for file in files:
        try:
            with file.open("rb") as opened:
                empty = not opened.read(1)
        except OSError as error:
            raise ForgeError(f"data {file}: cannot be read ({error.strerror}); check its permissions") from None
        if empty:
            raise ForgeError(f"data {file}: the file is empty; it must hold one conversation a line, such as {EXAMPLE}")
    return files


def digest_source(recipe: DataRecipe) -> str:
    """Identity of the raw rows: of the files' contents, not of their paths or times."""
    if recipe.source == DEMONSTRATION:
        return demonstration.digest(recipe.demonstration)
    return digest_json(sorted(digest_file(file) for file in find_files(recipe.source)))


def read_rows(recipe: DataRecipe, limit: int | None = None) -> Iterator[Row]:
    """Yield the validated rows of the source (of each file the first `limit` lines, where given).

    Raises Problems after the last line if any row was refused: nothing is dropped in silence.
    """
    if recipe.source == DEMONSTRATION:
        for number, value in enumerate(demonstration.rows(recipe.demonstration), 1):
            yield validate(value, recipe, f"demonstration:{number}")
        return
    refused: list[str] = []
    count = total = 0
    for file in find_files(recipe.source):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and number > limit:
                    break
                where = f"{file}:{number}"
                total += 1
                try:
                    yield validate(parse(line), recipe, where)
                except Invalid as reason:
                    count += 1
                    if len(refused) < SHOWN:
                        refused.append(f"{where}: {reason}")
    report(refused, count, f"{count} of {total} rows")


def report(refused: list[str], count: int, what: str) -> None:
    """Raise Problems if any row was refused."""
    if count:
        more = [f"... and {count - len(refused)} more"] if count > len(refused) else []
        raise Problems(f"data: {what} cannot be used:", [*refused, *more])


def parse(line: bytes) -> Any:
    """A line's JSON value; Invalid says what is wrong with it."""
    if line.startswith(codecs.BOM_UTF8):
        raise Invalid("the file starts with a byte order mark; save it as UTF-8 without one")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(f"not UTF-8 text (byte {error.start + 1}); convert the file to UTF-8") from None
    if not text.strip():
        raise Invalid("the line is empty; remove it")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not valid JSON ({error.msg} at column {error.colno})"
        raise Invalid(f"{what}; each line must be one row: {EXAMPLE}") from None
    except (ValueError, RecursionError) as error:
        raise Invalid(f"JSON that cannot be read ({error}); write the row more simply") from None


def validate(value: Any, recipe: DataRecipe, where: str) -> Row:
    """The row that a JSON value holds; Invalid says why it is none, and the mend."""
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise Invalid(f"no conversation: a row must hold a list of messages: {EXAMPLE}")
    messages = []
    for number, message in enumerate(value["messages"], 1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES:
            raise Invalid(f"message {number}: role is {role!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise Invalid(f"message {number} ({role}): content must be a text that is not empty")
        messages.append({"role": role, "content": content})
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if "system" in [message["role"] for message in messages[1:]]:
        raise Invalid("a system message may only come first; move it there")
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise Invalid("user and assistant must take turns, the user first and the assistant last; mend the order")
    group = value.get(recipe.group_column, " ".join(messages[-2]["content"].lower().split()))
    part = value.get(recipe.slice_column, "all")
    for name, column in ((recipe.group_column, group), (recipe.slice_column, part)):
        if not isinstance(column, str | int):
            raise Invalid(f"{name} must be a text or a whole number, not {type(column).__name__}")
    for text in (*(message["content"] for message in messages), str(group), str(part)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise Invalid("a text holds half a character (a lone surrogate); mend the program that wrote the row")
    return Row(messages, str(group), str(part), where)


def count_slices(rows: list[Row]) -> dict[str, int]:
    """Rows by slice, the largest first."""
    return dict(Counter(row.slice for row in rows).most_common())
