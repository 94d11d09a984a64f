"""Conversations as text: rendered with a model's chat template, and the assistant's turns in them.

A turn is trained exactly as the model has to write it when it is served: from the end of the prompt that a server
renders from the earlier messages, through the whole message, to the control token that ends the turn. A turn that the
template renders differently once other messages follow, such as one whose reasoning it then drops, is not trained.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

# Private, but the public render_jinja_template takes twice as long: it copies each conversation to make sure that
# templates only see plain JSON, which these messages are. The lock file pins the version, and tests cover both.
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from forge.core.contracts import TODAY
from forge.core.errors import ForgeError
from forge.models.chat_format import ChatFormat, Messages, TemplateError, Tools

Span = tuple[int, int]  # characters of a rendered conversation: first, and one past the last
Render = Callable[[Messages, bool], str]  # of messages, with or without the generation prompt

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
THINK = re.compile(r"</?think>")
BEFORE_END = 32  # characters that are compared together with the end of a turn


class Rendered(NamedTuple):
    """A conversation as text, and the spans of its trained turns, end tokens included.

    `ends` are the control tokens that end those turns. `differing` are the indices of messages that are not trained,
    because the template renders them differently once other messages follow.
    """

    text: str
    spans: list[Span]
    ends: frozenset[str] = frozenset()
    differing: tuple[int, ...] = ()


class _Differs(TemplateError):
    """The template renders a turn, or what comes before it, differently in the conversation than when it is served."""


class Renderer:
    """Renders conversations with a model's chat template and finds the assistant's turns in them.

    `where` names the model in errors.
    """

    def __init__(self, form: ChatFormat, where: str) -> None:
        self.form, self.where = form, where
        self._tokens = sorted(form.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._run = re.compile(rf"(?:\s|{self._special.pattern})*")
        self._variables = {**form.special, "strftime_now": TODAY.strftime}
        self._marked = {text: bool(GENERATION.search(text)) for text in form.templates.values()}
        self._endings: dict[tuple[str, bool], str] = {}  # of plain turns, by template and whether the turn is the last

    def probe(self) -> Rendered:
        """The rendering of a small conversation; ForgeError if its assistant turn cannot be found."""
        if not self.form.templates:
            raise ForgeError(
                "there is no chat template", where=self.where, fix="add chat_template.jinja, or use rows of plain text"
            )
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "ask"},
            {"role": "assistant", "content": "answer"},
        ]
        try:
            rendered = self.render(messages, None)
        except TemplateError as error:
            try:  # the prompt of some opens the reasoning, so every answer needs one
                rendered = self.render([messages[0], {**messages[1], "reasoning_content": "because"}], None)
            except TemplateError:
                raise ForgeError(f"the chat template cannot be used: {error}", where=self.where) from None
        trained = "".join(rendered.text[begin:end] for begin, end in rendered.spans)
        if "ask" in trained or "assistant" in trained:
            raise ForgeError(
                f"the chat template marks {trained!r} as the assistant's turn; it should mark the answer and end token",
                where=self.where,
                fix="add the turn's header if add_generation_prompt is set, or fix the {% generation %} block",
            )
        return rendered

    def render(self, messages: Messages, tools: Tools, untrained: Collection[int] = ()) -> Rendered:
        """A conversation as text with its trained turns, without the assistant's messages at the indices `untrained`.

        Raises TemplateError if the template rejects the conversation, leaves some of it out, or hides where a turn
        begins or ends, or if the last turn differs from what the model would write when it is served.
        """
        return self._as_template_takes_calls(messages, lambda given: self._turns(given, tools, untrained))

    def prompt(self, messages: Messages, tools: Tools) -> str:
        """The text that a server gives the model to answer these messages; TemplateError if the template rejects it."""
        return self._as_template_takes_calls(messages, lambda given: self._prompt(given, tools))

    def plain(self, text: str) -> Rendered:
        """A plain text between the model's begin and end tokens; all but the begin token is trained."""
        begin, end = self.form.special.get("bos_token", ""), self.form.special.get("eos_token", "")
        whole = begin + text + end
        return Rendered(whole, [(len(begin), len(whole))], frozenset([end] if end else []))

    def check_control_tokens(self, texts: Sequence[str]) -> None:
        """Raise TemplateError if a text contains a control token, which the model would take for the end of a turn."""
        for text in texts:
            if match := self._special.search(text):
                raise TemplateError(
                    "control token",
                    f"a text contains the model's control token {match.group()}, which it would not read as text",
                )

    def _prompt(self, messages: Messages, tools: Tools) -> str:
        rendered = self._compiled(tools)
        for at, message in enumerate(messages):  # so that the arguments of calls have the same form as in `render`
            if "tool_calls" in message:
                turn = rendered(messages[: at + 1], False).removeprefix(rendered(messages[:at], True))
                if missing := _missing_calls(message["tool_calls"], turn):
                    raise _left_out(missing)
        return rendered(messages, True)

    def _compiled(self, tools: Tools) -> Render:
        render = _compile_jinja_template(self.form.template(tools)).render
        fixed = {**self._variables, "tools": tools, "documents": None}
        return lambda messages, prompt: render(fixed, messages=messages, add_generation_prompt=prompt)

    def _as_template_takes_calls(self, messages: Messages, action: Callable[[Messages], Any]) -> Any:
        """Do something with messages, the arguments of tool calls as objects, or as JSON if the template needs that."""
        try:
            return _do(action, messages)
        except TemplateError as error:
            if not any("tool_calls" in message for message in messages):
                raise
            try:
                return _do(action, [_with_text_arguments(message) for message in messages])
            except TemplateError:
                raise error from None

    def _turns(self, messages: Messages, tools: Tools, untrained: Collection[int]) -> Rendered:
        rendered = self._compiled(tools)
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        text, blocks = self._text_and_blocks(messages, tools, rendered, len(turns))
        _check_context(messages, tools, text)
        spans: list[Span] = []
        ends: set[str] = set()
        differing: list[int] = []
        template = self.form.template(tools)
        for at in turns:
            if at in untrained:
                continue
            try:
                begin, end = self._turn(messages, at, rendered, template, text, blocks)
            except _Differs:
                if at == len(messages) - 1:
                    raise
                differing.append(at)
                continue
            spans.append((begin, end))
            ends.add(self._special.findall(text[begin:end])[-1])
        return Rendered(text, spans, frozenset(ends), tuple(differing))

    def _text_and_blocks(
        self, messages: Messages, tools: Tools, rendered: Render, turns: int
    ) -> tuple[str, Sequence[Span]]:
        """The text, and where turns may be: in generation blocks and the control tokens after them, if it has any."""
        template = self.form.template(tools)
        if not self._marked[template]:
            text = rendered(messages, False)
            return text, [(0, len(text))]
        text, blocks = _render_with_assistant_indices(
            _compile_jinja_template(template), messages, tools, None, False, **self._variables
        )
        if len(blocks) < turns:
            raise TemplateError(
                "chat template",
                f"the chat template marks {len(blocks)} of {turns} assistant turns; "
                "put a {% generation %} block around each",
            )
        joined: list[Span] = []
        for begin, end in blocks:
            run = self._run.match(text, len(text[:end].rstrip()))
            after = run.end() if run else end
            if joined and begin <= joined[-1][1]:  # such as one around the end token alone
                joined[-1] = (joined[-1][0], after)
            else:
                joined.append((begin, after))
        return text, joined

    def _turn(
        self, messages: Messages, at: int, rendered: Render, template: str, text: str, blocks: Sequence[Span]
    ) -> Span:
        """The span of one turn. Raises _Differs, or another TemplateError if a part of the message is missing."""
        prompt = rendered(messages[:at], True)
        if not text.startswith(prompt):
            raise _Differs(
                "chat template",
                f"message {at + 1}: in the whole conversation, the chat template renders the messages before it "
                "differently than in a server's prompt; if that prompt opens <think>, rows need reasoning_content",
            )
        within = next((block for block in blocks if block[1] > len(prompt)), None)
        if within is None:
            raise TemplateError("chat template", f"message {at + 1}: there is no {{% generation %}} block around it")
        begin = max(len(prompt), within[0])
        message, last = messages[at], at == len(messages) - 1
        # Nearly all turns are plain, and end like the first one, which was checked the long way.
        key = (template, last)
        plain = len(message) == 2 and not THINK.search(message["content"])
        plain = plain and (last or messages[at + 1]["role"] == "user")
        if plain and (ending := self._endings.get(key)):
            content = message["content"].strip()
            place = text.find(content, begin)
            after = place + len(content)
            while place >= 0 and text[after : after + 1].isspace() and not text.startswith(ending, after):
                after += 1
            if place >= 0 and text.startswith(ending, after) and not self._special.search(text, begin, place):
                return begin, after + len(ending)
        so_far = text if last else rendered(messages[: at + 1], False)
        if missing := _missing(message, so_far[begin:]):
            raise _left_out(missing)
        ends = self._token_ends(so_far, begin)
        if ends and not last:
            ends = [end for end in ends if text.startswith(so_far[:end])]
            if not ends:
                raise _Differs(
                    "chat template",
                    f"message {at + 1}: the chat template renders it differently once other messages follow",
                )
        ends = [end for end in ends if end <= within[1]]
        if not ends:
            raise TemplateError(
                "chat template", "no control token ends the assistant's turn, so the model would never stop"
            )
        end = self._end_of_last(messages, rendered, so_far, begin, ends) if last else ends[0]
        if plain:
            self._endings[key] = self._tail_of(so_far[begin:end])
        return begin, end

    def _end_of_last(self, messages: Messages, rendered: Render, text: str, begin: int, ends: list[int]) -> int:
        """Where the last turn ends: after the last control token that it also has once another message follows."""
        follows = {"role": "tool" if "tool_calls" in messages[-1] else "user", "content": "x"}
        try:
            followed = rendered([*messages, follows], False)
        except Exception:  # the template does not accept such a message
            return ends[0]
        return next((end for end in ends if text[max(begin, end - BEFORE_END) : end] in followed), ends[0])

    def _token_ends(self, text: str, begin: int) -> list[int]:
        """The ends of the control tokens at the end of a text, the last one first."""
        ends = []
        at = len(text.rstrip())
        while token := next((token for token in self._tokens if text.endswith(token, begin, at)), ""):
            ends.append(at)
            at = len(text[: at - len(token)].rstrip())
        return ends

    def _tail_of(self, turn: str) -> str:
        """The control tokens at the end of a turn."""
        ends = self._token_ends(turn, 0)
        first = next(token for token in self._tokens if turn.endswith(token, 0, ends[-1]))
        return turn[ends[-1] - len(first) :]


def _do(action: Callable[[Messages], Any], messages: Messages) -> Any:
    try:
        return action(messages)
    except TemplateError:
        raise
    except Exception as error:  # templates raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TemplateError("chat template", f"the chat template rejects the row: {reason}") from None


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text, as the OpenAI API has them."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _check_context(messages: Messages, tools: Tools, text: str) -> None:
    """Raise TemplateError if the template left out tools, or what the model should read of a message.

    Earlier reasoning may be left out: the model does not read it either.
    """
    if any(not _shows(text, str(tool.get("function", tool).get("name", ""))) for tool in tools or []):
        raise _left_out("tools")
    for message in messages:
        kind = "tool results" if message["role"] == "tool" else f"{message['role']} message"
        answer = THINK.split(message["content"])[-1]
        if not _shows(text, answer.strip()):
            raise _left_out("text next to tool calls" if "tool_calls" in message else kind)
        if "tool_calls" in message and (missing := _missing_calls(message["tool_calls"], text, True)):
            raise _left_out(missing)


def _missing(message: dict[str, Any], turn: str) -> str:
    """What a turn lacks of its message; "" if it is whole."""
    if not all(_shows(turn, part.strip()) for part in THINK.split(message["content"])):
        return "text next to tool calls" if "tool_calls" in message else "assistant message"
    if not _shows(turn, message.get("reasoning_content", "").strip()):
        return "reasoning_content"
    return _missing_calls(message["tool_calls"], turn) if "tool_calls" in message else ""


def _missing_calls(calls: Sequence[dict[str, Any]], text: str, as_context: bool = False) -> str:
    names = [call["function"]["name"] for call in calls]
    if any(text.count(name) < names.count(name) for name in names):
        return "tool calls"
    for call in calls:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, dict):
            arguments = json.loads(arguments)
        if not all(_shows(text, word) for word in _words(arguments)):
            return "arguments of tool calls"
        if not as_context and arguments and str(arguments) in text and _as_json(arguments) not in text:
            return "arguments of tool calls as JSON: it writes them as Python does"
    return ""


def _as_json(value: Any) -> str:
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


def _shows(text: str, part: str) -> bool:
    """Whether a text holds another, as it is or as it is in JSON."""
    return part in text or _as_json(part)[1:-1] in text or json.dumps(part)[1:-1] in text


def _left_out(what: str) -> TemplateError:
    return TemplateError("chat template", f"the chat template leaves out the row's {what}; use one that renders them")
