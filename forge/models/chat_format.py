"""The chat format of a tokenizer: its templates and special tokens, as text that other processes can be given."""

import functools
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from forge.core.digest import digest_json
from forge.core.errors import ForgeError

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]] | None


def has_scorable_answer(messages: Messages, untrained: Collection[int]) -> bool:
    """Whether a check can score a conversation's last message: a text without calls or reasoning, and to be learned."""
    if len(messages) < 2 or len(messages) - 1 in untrained:
        return False
    return not messages[-1].keys() & {"tool_calls", "reasoning_content"}


class TemplateError(Exception):
    """A conversation that a model's chat template cannot handle: `reason` is a short word to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


@functools.lru_cache(maxsize=2)  # large ones take a second, and a process needs one in several places
def exact_tokenizer(serialized: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json as it encodes rendered conversations: no truncation, padding or additions."""
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # templates write the special tokens, and some processors shift offsets
    return tokenizer


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
        tokens = exact_tokenizer(self.tokenizer).get_added_tokens_decoder().values()
        return [token.content for token in tokens if token.special]

    @property
    def shows_date(self) -> bool:
        """Whether a template writes today's date: a server's prompts then change every day."""
        return any("strftime_now" in template for template in self.templates.values())


def chat_format(tokenizer: Any, where: str) -> ChatFormat:
    """The chat format of a tokenizer; `where` names it in the ForgeError for one without a fast (Rust) version."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ForgeError("the tokenizer has no fast version", where=where, fix="save it with a tokenizer.json")
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    return ChatFormat(tokenizer.backend_tokenizer.to_str(), dict(templates), dict(tokenizer.special_tokens_map))
