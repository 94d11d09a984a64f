"""Conversations in a model's tokens: tokenizer, chat template, special tokens, and which tokens are the assistant's.

Preprocessing trains on the assistant's turns and evaluation scores them, and both get them here, so that a model is
scored on exactly the tokens that it was trained on. A turn runs from the end of the generation prompt to its
end-of-turn token, which is included: a model that never learns it never stops.
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import orjson
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from forge.core.errors import ForgeError
from forge.models.chat_format import Messages, Tools, chat_format, exact_tokenizer
from forge.models.conversation import Renderer, Span
from forge.registry.packages import LocalBase

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
    except Exception as error:  # tokenizers raises plain ones for a file that it cannot read
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

    def conversation(
        self, messages: Messages, tools: Tools, untrained: Collection[int] = ()
    ) -> tuple[list[int], np.ndarray]:
        """A whole conversation's tokens, and which of them are trained (bool [tokens]).

        `untrained` are the indices of assistant messages that are only read.

        Raises TemplateError if the conversation cannot be trained on.
        """
        rendered = self.renderer.render(messages, tools, untrained)
        self.renderer.check_control_tokens(conversation_texts(messages, tools))
        encoding = self._exact.encode(rendered.text, add_special_tokens=False)
        return encoding.ids, trained_mask(encoding.offsets, rendered.spans)
