"""Conversations as text: rendered with a model's chat template, and the assistant's turns in them.

A turn is trained exactly as the model has to write it when it is served: from the end of the prompt that a server
renders from the earlier messages, through the whole message, to the control token that ends the turn. A turn that the
template renders differently once other messages follow, such as one whose reasoning it then drops, is not trained.
"""

import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

# Private, but the public render_jinja_template takes twice as long: it copies each conversation to make sure that
# templates only see plain JSON, which these messages are. The lock file pins the version, and tests cover both.
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from forge.core.contracts import TODAY
from forge.core.errors import ForgeError
from forge.models.chat_format import ChatFormat, Messages, TemplateError, Tools, exact_tokenizer
from forge.models.left_out import THINK, as_json, check_context, left_out, missing_calls, missing_part

Span = tuple[int, int]  # characters of a rendered conversation: first, and one past the last
Render = Callable[[Messages, bool], str]  # of messages, with or without the generation prompt

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ROLE = re.compile(r"assistant|model|bot", re.IGNORECASE)  # names of the role in a turn's header
NEXT = re.compile(r"\s{0,32}\S{0,32}")  # the start of a turn, as much of it as may share a token with what is before
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
        self._exact = exact_tokenizer(form.tokenizer)
        self._tokens = sorted(form.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._markup = re.compile(f"{self._special.pattern}|{THINK.pattern}")
        self._run = re.compile(rf"(?:\s|{self._special.pattern})*")
        self._variables = {**form.special, "strftime_now": TODAY.strftime}
        self._marked = {text: bool(GENERATION.search(text)) for text in form.templates.values()}
        self._endings: dict[tuple[str, bool], str] = {}  # of plain turns, by template and whether the turn is the last
        self._openers: dict[str, str] = {}  # the control token that opens a turn's header, by template
        self._joined = functools.lru_cache(maxsize=100_000)(self._share_a_token)

    def probe(self) -> Rendered:
        """The rendering of a small conversation; ForgeError if its assistant turn cannot be found."""
        if not self.form.templates:
            raise ForgeError("there is no chat template", where=self.where, fix="add chat_template.jinja to it")
        ask = {"role": "user", "content": "ask"}
        answer = {"role": "assistant", "content": "answer"}
        thinking = [  # the prompt of some opens the reasoning, so every answer needs one
            {**answer, "reasoning_content": "because"},
            {**answer, "content": "<think>\nbecause\n</think>\n\nanswer"},
        ]
        try:
            rendered = self.render([ask, answer], None)
        except TemplateError as error:
            for turn in thinking:
                try:
                    rendered = self.render([ask, turn], None)
                    break
                except TemplateError:
                    pass
            else:
                raise ForgeError(f"the chat template cannot be used: {error}", where=self.where) from None
        ((begin, end),) = rendered.spans
        trained = rendered.text[begin:end]
        before = re.split("because|answer", trained)[0].lstrip()
        # A token such as <|im_start|>, which opens other messages too, opens this one's header.
        opener = self._special.match(before)
        if "ask" in trained or ROLE.search(before) or (opener and opener.group() in rendered.text[:begin]):
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
        return self._as_template_takes(messages, lambda given: self._turns(given, tools, untrained))

    def prompt(self, messages: Messages, tools: Tools) -> str:
        """The text that a server gives the model to answer these messages; TemplateError if the template rejects it."""
        return self._as_template_takes(messages, lambda given: self._prompt(given, tools))

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
                if missing := missing_calls(message["tool_calls"], turn):
                    raise left_out(missing)
        return rendered(messages, True)

    def _compiled(self, tools: Tools) -> Render:
        render = _compile_jinja_template(self.form.template(tools)).render
        fixed = {**self._variables, "tools": tools, "documents": None}
        return lambda messages, prompt: render(fixed, messages=messages, add_generation_prompt=prompt)

    def _as_template_takes(self, messages: Messages, action: Callable[[Messages], Any]) -> Any:
        """Do something with messages as a server gives them to the template.

        Reasoning is there under both of its names, and the arguments of tool calls as objects, or as JSON if the
        template needs that.
        """
        if any("reasoning_content" in message for message in messages):  # as transformers does
            messages = [
                {"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else message
                for message in messages
            ]
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
        check_context(messages, tools, text, self._markup)
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
                f"differently than in a server's prompt{_hint(prompt, messages[at])}",
            )
        within = next((block for block in blocks if block[1] > len(prompt)), None)
        if within is None:
            raise TemplateError("chat template", f"message {at + 1}: there is no {{% generation %}} block around it")
        begin = max(len(prompt), within[0])
        message, last = messages[at], at == len(messages) - 1
        self._check_start(text, begin, at, message, self._opener(messages, rendered, template))
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
        if missing := missing_part(message, so_far[begin:], self._markup):
            raise left_out(missing)
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

    def _opener(self, messages: Messages, rendered: Render, template: str) -> str:
        """The control token that opens the header of the assistant's turns; "" if there is none."""
        if template not in self._openers:
            first = next(at for at, message in enumerate(messages) if message["role"] == "assistant")
            shown, prompt = rendered(messages[:first], False), rendered(messages[:first], True)
            same = next(
                (at for at, pair in enumerate(zip(shown, prompt, strict=False)) if pair[0] != pair[1]), len(shown)
            )
            headers = (token.group() for token in self._special.finditer(prompt) if token.end() > same)
            self._openers[template] = next(headers, "")
        return self._openers[template]

    def _check_start(self, text: str, begin: int, at: int, message: dict[str, Any], opener: str) -> None:
        """Raise _Differs if a turn starts with its header, or inside a token: a model would not write it so."""
        start = NEXT.match(text, begin)
        after = start.group() if start else ""
        if opener and after.lstrip().startswith(opener):
            raise _Differs(
                "chat template",
                f"message {at + 1}: a server's prompt lacks the header of the turn, {opener}, so the model would have "
                "to write it",
            )
        window = max(0, begin - 64)
        token = text.rfind(opener, window, begin) if opener else -1
        if token < 0:
            token = max((match.start() for match in self._special.finditer(text, window, begin)), default=window)
        before = text[token:begin]
        if self._joined(before, after):
            raise _Differs(
                "chat template",
                f"message {at + 1}: its start, {after[:16]!r}, shares a token with the end of the prompt, "
                f"{before[-16:]!r}, which a server's prompt has as other tokens"
                + (_hint(before, message) or "; remove the white space at the start of the answer"),
            )

    def _share_a_token(self, before: str, after: str) -> bool:
        """Whether two texts, one after the other, have other tokens than the first one has by itself."""
        ids: list[int] = self._exact.encode(before, add_special_tokens=False).ids
        return self._exact.encode(before + after, add_special_tokens=False).ids[: len(ids)] != ids

    def _end_of_last(self, messages: Messages, rendered: Render, text: str, begin: int, ends: list[int]) -> int:
        """Where the last turn ends: after the last control token that it also has once another message follows."""
        content = "y" if messages[-1]["content"].endswith("x") else "x"  # so that it does not end as the turn does
        follows = {"role": "tool" if "tool_calls" in messages[-1] else "user", "content": content}
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


def _hint(prompt: str, message: dict[str, Any]) -> str:
    """What to change if a prompt opens or closes the reasoning, and the turn does not go on from there."""
    reasons = "reasoning_content" in message or THINK.search(message["content"])
    if prompt.rstrip().endswith("<think>"):
        needed = "the template must go on with the row's reasoning" if reasons else "rows need reasoning_content"
        return f": that prompt opens <think>, so {needed}"
    if prompt.rstrip().endswith("</think>") and reasons:
        return ": that prompt ends with an empty <think> block, so rows must have no reasoning"
    return ""


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text, as the OpenAI API has them."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": as_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
