"""The messages of a conversation, as they come in rows: checked, and brought into the form that templates take."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from forge.core.errors import printable
from forge.core.recipe import Turns
from tasks.preprocess.rows import EXAMPLE, Invalid, check_text, json_of, parse_list, parse_text, shown

ROLES = ("system", "user", "assistant", "tool")
OPTIONAL = ("name", "tool_call_id", "reasoning_content")  # kept in a message, besides role, content and tool_calls
RENAMED_KEYS = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}
MERGED = "merged with the message before"
DROPPED = "dropped, before the user's first message"
RENAMED_ROLES = {"function": "tool", "developer": "system"}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # keys of what is not text
LEARN = ("weight", "loss", "train", "trainable")  # keys that say whether an assistant turn is trained
MASKS = ("mask", "loss_mask", "train_detail")  # keys that say it in forms that are not read
FUNCTION = ("name", "arguments")  # keys of a function that is called
SERVED = ("name", "description", "parameters")  # keys of a tool's function that servers show, in this order
WRAPPER = ("id", "type", "index", "function")  # keys of a call around its function
_Turn = tuple[int, dict[str, Any], bool]  # a message with its number in the row, and whether it is trained


def check_messages(
    values: Any, turns: Turns, ignored: Counter[str], changed: Counter[str], first: int = 1
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """A conversation's messages, each with role, content and sometimes tool_calls; Invalid names the message.

    Also the indices of those that are not to be trained. `ignored` counts keys that are not used, and `changed` the
    messages that are merged or dropped, as `turns` says (data.turns in the recipe). `first` is the number of the first
    message: 0 if it is a column of its own.
    """
    if not isinstance(values, list) or not values:
        raise Invalid("no conversation", f"no conversation: a row must hold a list of messages: {EXAMPLE}")
    conversation: list[_Turn] = []
    for number, value in enumerate(values, first):
        what = f"message {number}" if number else "the column system"
        value = _of_openai(value, what)
        message = _message(value, what, ignored)
        conversation.append((number, message, len(value) < 3 or _learns(value, what)))
    if turns == "merge":
        conversation = _merged(conversation, changed)
    elif turns == "drop-leading":
        conversation = _without_leading(conversation, changed)
    _check_order(conversation)
    messages = [message for _, message, _ in conversation]
    untrained = tuple([at for at, (_, _, learned) in enumerate(conversation) if not learned])
    if untrained and all(at in untrained for at, message in enumerate(messages) if message["role"] == "assistant"):
        raise Invalid("nothing to train", "every assistant turn has weight 0 (or loss or train false); remove the row")
    return messages, untrained


def _merged(conversation: list[_Turn], changed: Counter[str]) -> list[_Turn]:
    """The turns with those joined that follow one of the same role. Calls and tools' answers stay as they are."""
    merged: list[_Turn] = []
    for number, message, learned in conversation:
        plain = message["role"] in ("user", "assistant") and len(message) == 2
        first, before, learned_before = merged[-1] if merged else (0, {}, False)
        if plain and len(before) == 2 and before["role"] == message["role"] and learned_before == learned:
            joined = {**before, "content": f"{before['content']}\n\n{message['content']}"}
            merged[-1] = (first, joined, learned)
            changed[MERGED] += 1
        else:
            merged.append((number, message, learned))
    return merged


def _without_leading(conversation: list[_Turn], changed: Counter[str]) -> list[_Turn]:
    """The turns without what the assistant says before the user does."""
    roles = [message["role"] for _, message, _ in conversation]
    head = 1 if roles[0] == "system" else 0
    first = next((at for at in range(head, len(roles)) if roles[at] != "assistant"), head)
    changed[DROPPED] += first - head
    return conversation[:head] + conversation[first:]


def _of_openai(value: Any, what: str) -> Any:
    """A message with what OpenAI's API has or had: function_call, and the roles function and developer."""
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str) or not (role in RENAMED_ROLES or value.get("function_call")):
        return value
    message = {**value, "role": RENAMED_ROLES.get(role, role)}
    if call := message.pop("function_call", None):
        if message.get("tool_calls"):
            raise Invalid("tool calls", f"{what} has tool_calls and function_call; remove one")
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
            raise Invalid("wrong type", f"{what}: {name} is {shown(entry)}; it must be 0 or 1, or false or true")
        if entry and value["role"] != "assistant":
            raise Invalid(
                "not an assistant turn", f"{what}: {name} is {shown(entry)}, but only assistant turns are trained"
            )
        learns = learns and bool(entry)
    return learns or value["role"] != "assistant"


def _message(value: Any, what: str, ignored: Counter[str]) -> dict[str, Any]:
    if _is_plain(value):
        return value
    role = value.get("role") if isinstance(value, dict) else None
    if role not in ROLES:
        sharegpt = isinstance(value, dict) and "from" in value
        hint = "; name a column of messages with from and value conversations" if sharegpt else ""
        raise Invalid("unknown role", f"{what}: role is {shown(role)}; it must be one of {', '.join(ROLES)}{hint}")
    reject_media(value, what)
    calls = parse_list(value.get("tool_calls"), f"{what}: tool_calls") if value.get("tool_calls") else None
    if calls and role != "assistant":
        raise Invalid("tool calls", f"{what} ({role}): only an assistant may have tool_calls")
    content = _content(value.get("content"), f"{what} ({role})")
    if not content and value.get("refusal"):
        raise Invalid("wrong type", f"{what} ({role}) has a refusal and no content; make the refusal its content")
    if calls and (content is None or content == ""):
        content = ""
    else:
        check_text(content, f"{what} ({role}): content")
    message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = check_calls(calls, what, ignored)
    optional: dict[str, str] = {}
    for name, entry in value.items():
        if entry is None or name in ("role", "content", "tool_calls", *LEARN):
            continue
        kept = RENAMED_KEYS.get(name, name)
        if name in MASKS:
            raise Invalid("not a weight", f"{what}: {name} is not read; give the turn a weight of 0 or 1 instead")
        if kept not in OPTIONAL:
            ignored[f"messages.{printable(name)}"] += 1
        elif isinstance(entry, str) and not entry.strip():
            continue
        elif optional.setdefault(kept, check_text(entry, f"{what} ({role}): {name}")) != entry:
            raise Invalid("two reasonings", f"{what} has {kept} and a different {name}; remove one")
    # In one order, since that of the keys is part of the row's digest.
    return message | {name: optional[name] for name in OPTIONAL if name in optional}


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
        raise Invalid(
            "wrong type",
            f"{what}: content has a part that is not text; only text can be trained on, and each part must be "
            '{"type": "text", "text": "..."}',
        )
    return "".join(texts)  # type: ignore[arg-type]


def check_calls(calls: Any, what: str, ignored: Counter[str]) -> list[dict[str, Any]]:
    """An assistant's tool calls, their arguments as objects. `ignored` counts keys that are not used."""
    checked = []
    for call in calls if isinstance(calls, list) else [None]:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise Invalid(
                "tool calls", f'{what}: a tool call must be {{"function": {{"name": "...", "arguments": {{...}}}}}}'
            )
        arguments = function.get("arguments")
        wrapped = function is not call
        known = FUNCTION if wrapped else (*FUNCTION, *WRAPPER)
        others = [key for key, entry in function.items() if key not in known and entry is not None]
        others += [key for key, entry in call.items() if key not in WRAPPER and entry is not None] if wrapped else []
        if others and arguments is None:
            raise Invalid(
                "tool calls",
                f"{what}: the call of {name} has no arguments, but {', '.join(others)}; write its arguments as "
                "arguments, next to its name",
            )
        ignored.update(f"messages.tool_calls.{printable(other)}" for other in others)
        if arguments is None or arguments == "":
            arguments = {}
        elif isinstance(arguments, str):
            arguments = parse_text(arguments, f"{what}: the arguments of {name}")
        else:
            arguments = json_of(arguments, f"{what}: the arguments of {name}")
        if not isinstance(arguments, dict):
            raise Invalid("tool calls", f"{what}: the arguments of {name} must be a JSON object")
        entry: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            entry["id"] = check_text(call["id"], f"{what}: tool_calls.id")
        checked.append(entry)
    return checked


def check_tools(value: Any, ignored: Counter[str]) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call: a list of JSON schemas, or its JSON text.

    They get the form in which vLLM gives a request's tools to the template. `ignored` counts keys that it leaves out.
    """
    value = parse_list(value, "tools") if value else None
    if not value:
        return None
    tools = json_of(value, "tools") if isinstance(value, list) else [None]
    return [_tool(tool, ignored) for tool in tools]


def _tool(tool: Any, ignored: Counter[str]) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise Invalid("tool calls", "tools must be a list of JSON schemas")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise Invalid("tool calls", "a tool has no name; add it to its function")
    others = [key for key in function if key not in (*SERVED, "strict", "type")]
    others += [] if function is tool else [key for key in tool if key not in ("type", "function")]
    ignored.update(f"tools.{printable(key)}" for key in others)
    shown = {key: function.get(key) for key in SERVED}
    strict = {"strict": function["strict"]} if function.get("strict") is not None else {}
    return {"type": "function", "function": {**shown, **strict}}


def _check_order(conversation: list[_Turn]) -> None:
    """Optional system, then user and assistant in turn; tool answers after tool calls; the assistant last."""
    has_system = conversation[0][1]["role"] == "system"
    turns = conversation[has_system:]
    expected: Iterable[str] = ("user",)
    for number, message, _ in turns:
        role = message["role"]
        if role == "system":
            other = ", into the one that is there" if has_system else ""
            raise Invalid(
                "roles out of order",
                f"message {number} (system): a system message may only come first; move it there{other}",
            )
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
    if not any(message["role"] == "assistant" for _, message, _ in turns):
        raise Invalid("no assistant turn", "no assistant turn: there is nothing to learn; add the answer")
    if turns[-1][1]["role"] != "assistant":
        raise Invalid(
            "roles out of order", "user and assistant must alternate, the assistant last; add the last answer"
        )
