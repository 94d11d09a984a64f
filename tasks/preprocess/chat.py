"""Tokenizer and chat template: what the model sees of a conversation, and which of it is trained.

Trained are the assistants' turns, from what follows the generation prompt to the end-of-turn token, which is trained
too: a model that never learns it never stops.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# Not public, but render_jinja_template, which is, takes twice the time: it copies each conversation to make sure that
# templates see plain JSON only, which rows are. The lock pins the version, and the tests cover both.
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from forge.core.contracts import TODAY
from forge.core.errors import ForgeError
from forge.registry.packages import LocalBase
from tasks.preprocess.rows import Invalid, Row
from tasks.preprocess.tokens import Span

# The whole assistant turn, its end included, stands in the generation block, and so is trained.
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


@dataclass(frozen=True)
class ChatFormat:
    """What is needed to render and tokenise in another process: all of it text."""

    tokenizer: str  # tokenizer.json
    template: str
    special: dict[str, str]  # bos_token and so on, which templates name

    @property
    def special_tokens(self) -> list[str]:
        """The control tokens: those that a text must not hold."""
        tokens = Tokenizer.from_str(self.tokenizer).get_added_tokens_decoder().values()
        return [token.content for token in tokens if token.special]


def load_tokenizer(base: LocalBase, context: int) -> Any:
    """The base model's tokenizer, or a byte-level one for a model that is trained from scratch."""
    if not base.location:
        return byte_tokenizer(context)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base.location, revision=base.revision or None, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ForgeError(f"base model {base.location}: its tokenizer cannot be loaded: {reason}") from None


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
    """What rendering and tokenising need of a tokenizer; ForgeError if it cannot be had from `where`."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ForgeError(f"{where}: its tokenizer has no fast form; save it with a tokenizer.json")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default", "")
    return ChatFormat(tokenizer.backend_tokenizer.to_str(), template or "", special)


def check_rendered(row: Row, text: str) -> None:
    """Raise Invalid if a template left out tools, calls, what tools answered, or what was thought before the answer."""
    if not row.tools and all(len(message) == 2 and message["role"] != "tool" for message in row.messages):
        return
    wanted = {"tools": [str(tool.get("function", tool).get("name", "")) for tool in row.tools or []]}
    wanted["tool calls"] = [call["function"]["name"] for m in row.messages for call in m.get("tool_calls", [])]
    wanted["tools' answers"] = [m["content"].strip() for m in row.messages if m["role"] == "tool"]
    wanted["words beside tool calls"] = [m["content"].strip() for m in row.messages if "tool_calls" in m]
    wanted["reasoning_content"] = [row.messages[-1].get("reasoning_content", "").strip()]
    for what, parts in wanted.items():
        if not all(part in text or _escaped(part) in text for part in parts):
            raise Invalid("chat template", f"the chat template leaves out the row's {what}; use one that renders them")


def _escaped(text: str) -> str:
    """As templates that write JSON have it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class Renderer:
    """Renders rows with a model's chat template, and says which characters are trained.

    A template that marks {% generation %} blocks is rendered once. Of any other, each assistant turn's beginning is
    found by rendering what comes before it with the generation prompt, as a server does. `where` names the base model.

    Raises ForgeError if the template cannot tell the assistants' words from the others'.
    """

    def __init__(self, form: ChatFormat, where: str) -> None:
        self.form, self.where = form, where
        self._tokens = tuple(sorted(form.special_tokens, key=len, reverse=True))
        self._special = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._variables = {**form.special, "strftime_now": TODAY.strftime}
        self._marked = bool(GENERATION.search(form.template))

    def probe(self) -> None:
        """Try the template on a small conversation."""
        if not self.form.template:
            raise ForgeError(f"{self.where}: it has no chat template; add chat_template.jinja, or give plain texts")
        messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
        row = Row(messages, None, None, "", "")
        try:
            text, spans = self._blocks(row) if self._marked else self._spans(row)
        except Invalid as reason:
            raise ForgeError(f"{self.where}: the chat template cannot be used: {reason.message}") from None
        except Exception as error:  # whatever a template raises
            raise ForgeError(f"{self.where}: the chat template cannot be used: {error}") from None
        learnt = "".join(text[begin:end] for begin, end in spans)
        if "answer" not in learnt or "ask" in learnt:
            raise ForgeError(
                f"{self.where}: the chat template marks {learnt!r} as the assistant's turn, which should be its answer "
                "with its end; mend its {% generation %} block"
            )

    def render(self, rows: Sequence[Row]) -> list[tuple[str, list[Span]] | Invalid]:
        """Each row's text and its trained spans of characters, or why it cannot be rendered."""
        return [self._try(row) for row in rows]

    def special_in(self, texts: Sequence[str]) -> str | None:
        """A control token that a row's texts hold: the model would take it for the end of a turn, say."""
        for text in texts:
            if found := self._special.search(text):
                return found.group()
        return None

    def _try(self, row: Row) -> tuple[str, list[Span]] | Invalid:
        try:
            if row.text is not None:
                return self._plain(row.text)
            text, spans = self._blocks(row) if self._marked else self._spans(row)
            check_rendered(row, text)
            return text, spans
        except Invalid as reason:
            return reason
        except Exception as error:  # whatever a template raises about a row
            reason_given = (str(error) or type(error).__name__).splitlines()[0]
            return Invalid("chat template", f"the chat template refuses the row: {reason_given}")

    def _plain(self, text: str) -> tuple[str, list[Span]]:
        """A plain text, between the tokens of beginning and end; all but the beginning is trained."""
        begin, end = self.form.special.get("bos_token", ""), self.form.special.get("eos_token", "")
        whole = begin + text + end
        return whole, [(len(begin), len(whole))]

    def _blocks(self, row: Row) -> tuple[str, list[Span]]:
        """One rendering, for templates with generation blocks."""
        text, spans = _render_with_assistant_indices(
            _compile_jinja_template(self.form.template), row.messages, row.tools, None, False, **self._variables
        )
        return text, [self._with_end(text, begin, end) for begin, end in spans]

    def _with_end(self, text: str, begin: int, end: int) -> Span:
        """A block and, where the template has it behind the block, its end-of-turn token."""
        within = text[begin:end].rstrip()
        if within.endswith(self._tokens):
            return begin, begin + len(within)
        if found := self._special.match(text, end):
            return begin, found.end()
        raise Invalid("chat template", "no control token ends the assistant's turn, so the model would never stop")

    def _spans(self, row: Row) -> tuple[str, list[Span]]:
        """Renderings of what comes before each assistant turn, for templates without generation blocks."""
        turns = [at for at, message in enumerate(row.messages) if message["role"] == "assistant"]
        text = self._rendered(row.messages, row, False)
        spans = []
        for at in turns:
            prompt = self._rendered(row.messages[:at], row, True)
            if not text.startswith(prompt):
                raise Invalid(
                    "chat template",
                    f"message {at + 1}: the chat template renders what comes before it in another way than it would "
                    "for a server; put a {% generation %} block around the assistant's turn in the template",
                )
            spans.append((len(prompt), self._end_of(row, at, text, len(prompt))))
        return text, spans

    def _end_of(self, row: Row, at: int, text: str, begin: int) -> int:
        """Where an assistant turn ends: behind the control token that follows its words."""
        if "tool_calls" in row.messages[at]:  # whose own control tokens are part of the turn
            so_far = self._rendered(row.messages[: at + 1], row, False).rstrip()
            last = next((token for token in self._tokens if so_far.endswith(token)), None)
            if last and (place := text.find(last, begin)) >= 0:
                return place + len(last)
        elif found := self._special.search(text, begin):
            return found.end()
        raise Invalid("chat template", "no control token ends the assistant's turn, so the model would never stop")

    def _rendered(self, messages: list[dict[str, Any]], row: Row, prompt: bool) -> str:
        template = _compile_jinja_template(self.form.template)
        known = {"messages": messages, "tools": row.tools, "documents": None, "add_generation_prompt": prompt}
        return template.render(**known, **self._variables)
