"""Conversations in a model's tokens: tokenizer, chat template, special tokens, and which tokens are the assistant's.

Preprocessing trains on the assistant's turns and evaluation scores them, and both get them here, so that a model is
scored on exactly the tokens that it was trained on. A turn runs from the end of the generation prompt to its
end-of-turn token, which is included: a model that never learns it never stops.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# Private, but the public render_jinja_template takes twice as long: it copies each conversation to make sure that
# templates only see plain JSON, which these messages are. The lock file pins the version, and tests cover both.
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from forge.core.contracts import TODAY
from forge.core.digest import digest_json
from forge.core.errors import ForgeError
from forge.registry.packages import LocalBase

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]] | None
Span = tuple[int, int]  # characters of a rendered conversation: first, and one past the last

# The generation block holds the whole assistant turn, including its end token.
BYTE_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
BLOCK_FIX = "put a {% generation %} block around the assistant's turn in the template"


class TemplateError(Exception):
    """A conversation that a model's chat template cannot handle: `reason` is a short word to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class ChatFormat:
    """All that rendering and tokenizing need of a tokenizer, as text that another process can be given."""

    tokenizer: str  # tokenizer.json
    templates: dict[str, str]  # by name; a tokenizer's only template is "default"
    special: dict[str, str]  # bos_token and so on, as templates name them

    def template(self, tools: Tools = None) -> str:
        """The template for a conversation with these tools, chosen as `get_chat_template` and servers choose it.

        Raises TemplateError if there is none.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            problem = "the tokenizer has no chat template; add chat_template.jinja"
            if self.templates:
                problem = f"none of the chat templates ({', '.join(sorted(self.templates))}) is named default; add one"
            raise TemplateError("chat template", problem)
        return self.templates[name]

    @property
    def template_digest(self) -> str:
        """SHA-256 of the only template, or of all named ones."""
        if self.templates.keys() <= {"default"}:
            return hashlib.sha256(self.templates.get("default", "").encode()).hexdigest()
        return digest_json(self.templates)

    @property
    def special_tokens(self) -> list[str]:
        """The control tokens, which no message may contain."""
        tokens = Tokenizer.from_str(self.tokenizer).get_added_tokens_decoder().values()
        return [token.content for token in tokens if token.special]

    @property
    def shows_date(self) -> bool:
        """Whether a template writes today's date: a server's prompts then change every day."""
        return any("strftime_now" in template for template in self.templates.values())


def load_tokenizer(base: LocalBase, context: int = 0, padding_side: Literal["left", "right"] | None = None) -> Any:
    """The tokenizer of a model, or a byte-level one (limited to `context` tokens) for a model trained from scratch.

    With `padding_side` it is set up for batches, and pads with its end token if it has no padding token.

    Raises ForgeError if it cannot be loaded.
    """
    if not base.location:
        return byte_tokenizer(context)
    from transformers import AutoTokenizer

    side = {"padding_side": padding_side} if padding_side else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.location, revision=base.revision or None, trust_remote_code=False, **side
        )
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ForgeError(f"the tokenizer cannot be loaded: {reason}", where=f"model {base.location}") from None
    if padding_side and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_tokenizer(context: int) -> Any:
    """A tokenizer of the 256 bytes and six special tokens, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    vocabulary = {token: number for number, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=context
    )
    fast.chat_template = BYTE_TEMPLATE
    return fast


def chat_format(tokenizer: Any, where: str) -> ChatFormat:
    """The chat format of a tokenizer; `where` names it in the ForgeError for one without a fast (Rust) version."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ForgeError("the tokenizer has no fast version", where=where, fix="save it with a tokenizer.json")
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    return ChatFormat(tokenizer.backend_tokenizer.to_str(), dict(templates), dict(tokenizer.special_tokens_map))


def exact_tokenizer(serialized: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json as it encodes rendered conversations: no truncation, padding or additions."""
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # templates write the special tokens, and some processors shift offsets
    return tokenizer


def trained_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens (bool [tokens], by their offsets) belong to spans: those whose first character is in one.

    The last character does not count, since an end-of-turn token may absorb the line break after it. The first token
    of a sequence is never a target: no token comes before it to predict it from.
    """
    starts = np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
    mask = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    mask[:1] = False
    return mask


def conversation_texts(messages: Messages, tools: Tools) -> list[str]:
    """All texts of a conversation that did not come from the template; tool calls and tools as JSON."""
    texts = [message["content"] for message in messages]
    for message in messages:
        if len(message) > 2:
            others = (value for key, value in message.items() if key not in ("role", "content"))
            texts += [value if isinstance(value, str) else orjson.dumps(value).decode() for value in others]
    return texts + ([orjson.dumps(tools).decode()] if tools else [])


class Renderer:
    """Renders conversations with a model's chat template and finds the assistant's turns in them.

    A template with {% generation %} blocks is rendered once. With any other, an assistant turn begins where the
    rendering of the messages before it, with the generation prompt that a server adds, ends.
    `where` names the model in errors.
    """

    def __init__(self, form: ChatFormat, where: str) -> None:
        self.form, self.where = form, where
        self._tokens = tuple(sorted(form.special_tokens, key=len, reverse=True))
        self._special = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._variables = {**form.special, "strftime_now": TODAY.strftime}
        self._marked = {text: bool(GENERATION.search(text)) for text in form.templates.values()}

    def probe(self) -> None:
        """Try the template on a small conversation; ForgeError if its assistant turn cannot be found."""
        if not self.form.templates:
            raise ForgeError(
                "there is no chat template", where=self.where, fix="add chat_template.jinja, or use rows of plain text"
            )
        messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
        try:
            text, spans = self._text_and_spans(messages, None)
        except Exception as error:  # templates raise anything
            raise ForgeError(f"the chat template cannot be used: {error}", where=self.where) from None
        trained = "".join(text[begin:end] for begin, end in spans)
        if "answer" not in trained or "ask" in trained:
            raise ForgeError(
                f"the chat template marks {trained!r} as the assistant's turn; it should mark the answer and end token",
                where=self.where,
                fix="fix its {% generation %} block",
            )

    def render(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        """A conversation as text, and the spans of the assistant's turns in it, end tokens included.

        Raises TemplateError if the template rejects the conversation, leaves some of it out, or hides where a turn
        begins or ends.
        """
        try:
            text, spans = self._text_and_spans(messages, tools)
            check_complete(messages, tools, text)
            return text, spans
        except TemplateError:
            raise
        except Exception as error:  # templates raise anything
            raise _rejected(error) from None

    def prompt(self, messages: Messages, tools: Tools) -> str:
        """The text that a server gives the model to answer these messages; TemplateError if the template rejects it."""
        try:
            return self._compiled(tools)(messages, True)
        except TemplateError:
            raise
        except Exception as error:  # templates raise anything
            raise _rejected(error) from None

    def plain(self, text: str) -> tuple[str, list[Span]]:
        """A plain text between the model's begin and end tokens; all but the begin token is trained."""
        begin, end = self.form.special.get("bos_token", ""), self.form.special.get("eos_token", "")
        whole = begin + text + end
        return whole, [(len(begin), len(whole))]

    def check_control_tokens(self, texts: Sequence[str]) -> None:
        """Raise TemplateError if a text contains a control token, which the model would take for the end of a turn."""
        for text in texts:
            if match := self._special.search(text):
                raise TemplateError(
                    "control token",
                    f"a text contains the model's control token {match.group()}, which it would not read as text",
                )

    def _text_and_spans(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        template = self.form.template(tools)
        if not self._marked[template]:
            return self._by_prompts(messages, tools)
        text, spans = _render_with_assistant_indices(
            _compile_jinja_template(template), messages, tools, None, False, **self._variables
        )
        return text, [self._with_end(text, begin, end) for begin, end in spans]

    def _with_end(self, text: str, begin: int, end: int) -> Span:
        """The span of a generation block and of the end token, which may follow the block."""
        within = text[begin:end].rstrip()
        if within.endswith(self._tokens):
            return begin, begin + len(within)
        if match := self._special.match(text, end):
            return begin, match.end()
        raise _endless()

    def _by_prompts(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        """Text and spans for a template without generation blocks."""
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        rendered = self._compiled(tools)
        text = rendered(messages, False)
        spans = []
        for at in turns:
            prompt = rendered(messages[:at], True)
            if not text.startswith(prompt):
                raise TemplateError(
                    "chat template",
                    f"message {at + 1}: in the whole conversation, the chat template renders the messages before it "
                    f"differently than in a server's prompt; {BLOCK_FIX}",
                )
            spans.append((len(prompt), self._end_of(messages[: at + 1], rendered, text, len(prompt))))
        return text, spans

    def _end_of(self, messages: Messages, rendered: Callable[[Messages, bool], str], text: str, begin: int) -> int:
        """Where the last of these messages ends: after its first control token, or its last one if it calls tools."""
        if "tool_calls" in messages[-1]:  # a call may have control tokens of its own
            so_far = rendered(messages, False).rstrip()
            last = next((token for token in self._tokens if so_far.endswith(token)), None)
            if last and (place := text.find(last, begin)) >= 0:
                return place + len(last)
        elif match := self._special.search(text, begin):
            return match.end()
        raise _endless()

    def _compiled(self, tools: Tools) -> Callable[[Messages, bool], str]:
        """A function that renders messages, with or without the generation prompt."""
        render = _compile_jinja_template(self.form.template(tools)).render
        fixed = {**self._variables, "tools": tools, "documents": None}
        return lambda messages, prompt: render(fixed, messages=messages, add_generation_prompt=prompt)


class ChatTokenizer:
    """A model's conversations in tokens, encoded whole by its own tokenizer."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        self.format = chat_format(tokenizer, where)
        self.renderer = Renderer(self.format, where)

    @functools.cached_property
    def _exact(self) -> Tokenizer:
        return exact_tokenizer(self.format.tokenizer)

    def prompt(self, messages: Messages, tools: Tools) -> list[int]:
        """The tokens that a server gives the model to answer these messages; TemplateError as from `Renderer`."""
        ids: list[int] = self._exact.encode(self.renderer.prompt(messages, tools), add_special_tokens=False).ids
        return ids

    def conversation(self, messages: Messages, tools: Tools) -> tuple[list[int], np.ndarray]:
        """A whole conversation's tokens, and which of them are trained (bool [tokens]).

        Raises TemplateError if the conversation cannot be trained on.
        """
        text, spans = self.renderer.render(messages, tools)
        self.renderer.check_control_tokens(conversation_texts(messages, tools))
        encoding = self._exact.encode(text, add_special_tokens=False)
        return encoding.ids, trained_mask(encoding.offsets, spans)


def check_complete(messages: Messages, tools: Tools, text: str) -> None:
    """Raise TemplateError if a template left out tools, tool calls, tool results, or the reasoning of the last turn."""
    if not tools and all(len(message) == 2 and message["role"] != "tool" for message in messages):
        return
    expected = {"tools": [str(tool.get("function", tool).get("name", "")) for tool in tools or []]}
    expected["tool calls"] = [call["function"]["name"] for m in messages for call in m.get("tool_calls", [])]
    expected["tool results"] = [m["content"].strip() for m in messages if m["role"] == "tool"]
    expected["text next to tool calls"] = [m["content"].strip() for m in messages if "tool_calls" in m]
    expected["reasoning_content"] = [messages[-1].get("reasoning_content", "").strip()]
    for what, parts in expected.items():
        if not all(part in text or _escaped(part) in text for part in parts):
            raise TemplateError(
                "chat template", f"the chat template leaves out the row's {what}; use one that renders them"
            )


def _escaped(text: str) -> str:
    """A text as templates that write JSON have it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _rejected(error: Exception) -> TemplateError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return TemplateError("chat template", f"the chat template rejects the row: {reason}")


def _endless() -> TemplateError:
    return TemplateError("chat template", "no control token ends the assistant's turn, so the model would never stop")
