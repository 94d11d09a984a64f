"""The messages of a conversation, as they come in rows: checked, and brought into the form that templates take."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from forge.core.recipe import Turns
from tasks.preprocess.rows import EXAMPLE, Invalid, check_text, parse_list, parse_text, printable, without_nulls

ROLES = ("system", "user", "assistant", "tool")
OPTIONAL = ("name", "tool_call_id", "reasoning_content")  # kept in a message, besides role, content and tool_calls
MERGED = "merged with the message before"
DROPPED = "dropped, before the user's first message"
RENAMED_ROLES = {"function": "tool", "developer": "system"}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # keys of what is not text
LEARN = ("weight", "loss", "train", "trainable")  # keys that say whether an assistant turn is trained


def check_messages(
    values: Any, turns: Turns, ignored: Counter[str], changed: Counter[str]
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """A conversation's messages, each with role, content and sometimes tool_calls; Invalid names the message.

    Also the indices of those that are not to be trained. `ignored` counts keys that are not used, and `changed` the
    messages that are merged or dropped, as `turns` says (data.turns in the recipe).
    """
    if not isinstance(values, list) or not values:
        raise Invalid("no conversation", f"no conversation: a row must hold a list of messages: {EXAMPLE}")
    values = [_of_openai(value) for value in values]
    messages = [_message(value, f"message {number}", ignored) for number, value in enumerate(values, 1)]
    learns = [len(value) < 3 or _learns(value, f"message {number}") for number, value in enumerate(values, 1)]
    if turns == "merge":
        messages, learns = _merged(messages, learns, changed)
    elif turns == "drop-leading":
        messages, learns = _without_leading(messages, learns, changed)
    _check_order(messages)
    untrained = tuple(at for at, learned in enumerate(learns) if not learned)
    if untrained and all(at in untrained for at, message in enumerate(messages) if message["role"] == "assistant"):
        raise Invalid("nothing to train", "every assistant turn has weight 0 (or loss or train false); remove the row")
    return messages, untrained


def _merged(
    messages: list[dict[str, Any]], learns: list[bool], changed: Counter[str]
) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages with those joined that follow one of the same role. Calls and tools' answers stay as they are."""
    merged: list[dict[str, Any]] = []
    kept: list[bool] = []
    for message, learned in zip(messages, learns, strict=True):
        plain = message["role"] in ("user", "assistant") and len(message) == 2
        before = merged[-1] if merged else {}
        if plain and len(before) == 2 and before["role"] == message["role"] and kept[-1] == learned:
            merged[-1] = {**before, "content": f"{before['content']}\n\n{message['content']}"}
            changed[MERGED] += 1
        else:
            merged.append(message)
            kept.append(learned)
    return merged, kept


def _without_leading(
    messages: list[dict[str, Any]], learns: list[bool], changed: Counter[str]
) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages without what the assistant says before the user does."""
    head = 1 if messages[0]["role"] == "system" else 0
    first = next((at for at in range(head, len(messages)) if messages[at]["role"] != "assistant"), head)
    changed[DROPPED] += first - head
    return messages[:head] + messages[first:], learns[:head] + learns[first:]


def _of_openai(value: Any) -> Any:
    """A message with what OpenAI's API has or had: function_call, and the roles function and developer."""
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str) or not (role in RENAMED_ROLES or value.get("function_call")):
        return value
    message = {**value, "role": RENAMED_ROLES.get(role, role)}
    if call := message.pop("function_call", None):
        if message.get("tool_calls"):
            raise Invalid("tool calls", "a message has tool_calls and function_call; remove one")
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
    calls = parse_list(value.get("tool_calls"), f"{what}: tool_calls") if value.get("tool_calls") else None
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
        if name in OPTIONAL:
            if entry is not None and not (isinstance(entry, str) and not entry.strip()):
                message[name] = check_text(entry, f"{what} ({role}): {name}")
        elif name not in ("role", "content", "tool_calls", *LEARN) and entry is not None:
            ignored[f"messages.{printable(name)}"] += 1
    return message


def reject_media(value: dict[str, Any], what: str) -> None:
    """Raise Invalid if a row or a message has images, video or audio."""
    for name in MEDIA:
        if value.get(name):
            raise Invalid("not only text", f"{what} has {name}, and only text can be trained on; remove the row")


def _is_plain(value: Any) -> bool:
    """Whether a message has a role and a text and nothing else, as nearly all do: a fast path."""
    if not isinstance(value, dict) or len(value) != 2 or next(iter(value)) != "role" or value["role"] not in ROLES:
        return False
    content = value.get("content")
    return isinstance(content, str) and bool(content) and not content.isspace()


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
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise Invalid(
                "tool calls", f'{what}: a tool call must be {{"function": {{"name": "...", "arguments": {{...}}}}}}'
            )
        arguments = function.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        elif isinstance(arguments, str):
            arguments = parse_text(arguments, f"{what}: the arguments of {name}")
        else:
            arguments = without_nulls(arguments)
        if not isinstance(arguments, dict):
            raise Invalid("tool calls", f"{what}: the arguments of {name} must be a JSON object")
        entry: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            entry["id"] = check_text(call["id"], f"{what}: tool_calls.id")
        checked.append(entry)
    return checked


def _is_tool(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("function", value), dict)


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call: a list of JSON schemas, or its JSON text."""
    value = parse_list(value, "tools") if value else None
    if not value:
        return None
    if not isinstance(value, list) or not all(_is_tool(tool) for tool in value):
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
                "alternate, the user first and the assistant last, and a tool answers a tool call; fix the order, or "
                "see data.turns",
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
