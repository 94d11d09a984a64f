"""What a row must look like. Every rejection has a reason to count by, and a message that says how to fix the row."""

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError

from forge.core.recipe import Check

ROLES = ("system", "user", "assistant", "tool")
EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
HALF = "half a character (a lone surrogate)"
EACH_LINE = f"; each line must be one complete row: {EXAMPLE}"
OPTIONAL = ("name", "tool_call_id", "reasoning_content")  # kept in a message, besides role, content and tool_calls
RENAMED_ROLES = {"function": "tool", "developer": "system"}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # keys of what is not text
LEARN = ("weight", "loss", "train", "trainable")  # keys that say whether an assistant turn is trained


class Invalid(Exception):
    """Why a row is rejected: `reason` is a short name to count by, `message` says what to do about it."""

    def __init__(self, reason: str, message: str) -> None:
        message = printable(message)
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
        raise Invalid("duplicate key", f"the key {twice!r} appears twice in one object; remove one")
    return value


def _no_constant(name: str) -> Any:
    raise Invalid("not a number", f"{name} is not valid JSON; write a number or null")


def parse(line: bytes) -> Any:
    """The JSON value of a line; Invalid says what is wrong with it."""
    if line.startswith(codecs.BOM_UTF8):
        raise Invalid("byte order mark", "the file starts with a byte order mark; save it as UTF-8 without one")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid("not UTF-8", f"not UTF-8 text (byte {error.start + 1}); convert the file to UTF-8") from None
    if not text.strip():
        raise Invalid("empty line", "the line is empty; remove it")
    try:
        return json.loads(text, object_pairs_hook=_no_duplicate_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        what = f"not valid JSON ({error.msg} at column {error.colno})"
        raise Invalid("not JSON", what + EACH_LINE) from None
    except (ValueError, RecursionError) as error:
        raise Invalid("not JSON", f"JSON that cannot be read ({error}); simplify the row") from None


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
    """A value without the nulls in its objects: Arrow gives each object every key that any of them has."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def check_text(value: Any, what: str) -> str:
    """The value, if it is a non-empty string."""
    if not isinstance(value, str):
        raise Invalid("wrong type", f"{what} must be a string, not {_kind(value)}")
    if not value.strip():
        raise Invalid("empty content", f"{what} must not be empty")
    return value


def check_messages(values: Any, ignored: Counter[str]) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """A conversation's messages, each with role, content and sometimes tool_calls; Invalid names the message.

    Also the indices of those that are not to be trained. `ignored` counts keys that are not used.
    """
    if not isinstance(values, list) or not values:
        raise Invalid("no conversation", f"no conversation: a row must hold a list of messages: {EXAMPLE}")
    values = [_of_openai(value) for value in values]
    messages = [_message(value, f"message {number}", ignored) for number, value in enumerate(values, 1)]
    _check_order(messages)
    untrained = tuple(
        at for at, value in enumerate(values) if len(value) > 2 and not _learns(value, f"message {at + 1}")
    )
    if untrained and all(at in untrained for at, message in enumerate(messages) if message["role"] == "assistant"):
        raise Invalid("nothing to train", "every assistant turn has weight 0 (or loss or train false); remove the row")
    return messages, untrained


def _of_openai(value: Any) -> Any:
    """A message with names that OpenAI's API has had: function_call and the role function, and the role developer."""
    if not isinstance(value, dict) or not (value.get("function_call") or value.get("role") in RENAMED_ROLES):
        return value
    role = value.get("role")
    message = {**value, "role": RENAMED_ROLES.get(role, role) if isinstance(role, str) else role}
    if call := message.pop("function_call", None):
        message["tool_calls"] = [call]
    return message


def _learns(value: dict[str, Any], what: str) -> bool:
    """Whether an assistant's message is trained, as its keys in LEARN say; other messages never are."""
    learns = True
    for name in LEARN:
        entry = value.get(name)
        if entry is None:
            continue
        if entry not in (0, 1):
            raise Invalid("wrong type", f"{what}: {name} is {entry!r}; it must be 0 or 1, or false or true")
        if entry and value["role"] != "assistant":
            raise Invalid("not an assistant turn", f"{what}: {name} is {entry!r}, but only assistant turns are trained")
        learns = learns and bool(entry)
    return learns or value["role"] != "assistant"


def _message(value: Any, what: str, ignored: Counter[str]) -> dict[str, Any]:
    if _is_plain(value):
        return value
    role = value.get("role") if isinstance(value, dict) else None
    if role not in ROLES:
        raise Invalid("unknown role", f"{what}: role is {role!r}; it must be one of {', '.join(ROLES)}")
    reject_media(value, what)
    calls = value.get("tool_calls")
    if calls and role != "assistant":
        raise Invalid("tool calls", f"{what} ({role}): only an assistant may have tool_calls")
    content = _content(value.get("content"), f"{what} ({role})")
    if calls and not content:
        content = ""
    else:
        check_text(content, f"{what} ({role}): content")
    message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = check_calls(calls, what)
    for name, entry in value.items():
        if name in OPTIONAL and entry is not None:
            message[name] = check_text(entry, f"{what} ({role}): {name}")
        elif name not in ("role", "content", "tool_calls", *LEARN) and entry is not None:
            ignored[f"messages.{printable(name)}"] += 1
    return message


def reject_media(value: dict[str, Any], what: str) -> None:
    """Raise Invalid if a row or a message has pictures, films or sounds."""
    for name in MEDIA:
        if value.get(name):
            raise Invalid("not only text", f"{what} has {name}, and only text can be trained on; remove the row")


def _is_plain(value: Any) -> bool:
    """Whether a message has a role and a text and nothing else, as nearly all do: a fast path."""
    if not isinstance(value, dict) or len(value) != 2 or next(iter(value)) != "role" or value["role"] not in ROLES:
        return False
    content = value.get("content")
    return isinstance(content, str) and bool(content) and not content.isspace()


def printable(text: str) -> str:
    """The text with lone surrogates escaped, so that any file can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _content(value: Any, what: str) -> Any:
    """A content as text; a list of text parts, as in the OpenAI API, is joined."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    if any(not isinstance(text, str) for text in texts):
        raise Invalid("wrong type", f"{what}: content has a part that is not text; only text can be trained on")
    return "".join(texts)  # type: ignore[arg-type]


def check_calls(calls: Any, what: str) -> list[dict[str, Any]]:
    """An assistant's tool calls, their arguments as objects."""
    checked = []
    calls = parse_list(calls, f"{what}: tool_calls")
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise Invalid(
                "tool calls", f'{what}: a tool call must be {{"function": {{"name": "...", "arguments": {{...}}}}}}'
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = parse_text(arguments, f"{what}: the arguments of {name}") if arguments.strip() else {}
        else:
            arguments = without_nulls(arguments)
        if not isinstance(arguments, dict):
            raise Invalid("tool calls", f"{what}: the arguments of {name} must be a JSON object")
        entry: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            entry["id"] = check_text(call["id"], f"{what}: tool_calls.id")
        checked.append(entry)
    return checked


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call: a list of JSON schemas, or its JSON text."""
    value = parse_list(value, "tools") if value else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Invalid("tool calls", "tools must be a list of JSON schemas")
    tools: list[dict[str, Any]] = without_nulls(value)
    return tools


def _check_order(messages: list[dict[str, Any]]) -> None:
    """Optional system, then user and assistant in turn; tool answers after tool calls; the assistant last."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    expected: Iterable[str] = ("user",)
    for number, message in enumerate(turns, 1 + len(messages) - len(turns)):
        role = message["role"]
        if role == "system":
            raise Invalid("roles out of order", "a system message may only come first; move it there")
        if role not in expected:
            raise Invalid(
                "roles out of order",
                f"message {number} ({role}): expected {' or '.join(expected)} here; user and assistant must "
                "alternate, the user first and the assistant last, and a tool answers a tool call; fix the order",
            )
        expected = {
            "user": ("assistant",),
            "tool": ("tool", "assistant"),
            "assistant": ("tool",) if "tool_calls" in message else ("user",),
        }[role]
    if not any(message["role"] == "assistant" for message in turns):
        raise Invalid("no assistant turn", "no assistant turn: there is nothing to learn; add the answer")
    if turns[-1]["role"] != "assistant":
        raise Invalid(
            "roles out of order", "user and assistant must alternate, the assistant last; add the last answer"
        )


def check_judgement(value: Any, name: str) -> str:
    """How a row's answer is scored, as JSON: a kind of `Check`, or an object (or its JSON text) with its fields."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_text(value, name)
    if isinstance(value, str):
        value = {"kind": value}
    try:
        return Check.model_validate(value).model_dump_json(exclude_defaults=True)
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
        raise Invalid("wrong type", f"{name} must be a string or an integer, not {_kind(value)}")
    return str(value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
