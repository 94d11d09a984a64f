"""Tokenizer and chat template: what the model sees of a conversation, and which tokens it is trained on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tasks.contracts import Base
from tasks.errors import ForgeError
from tasks.preprocess.rows import Row

BATCH = 1024
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


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation as tokens: `tokens` (uint32) and `trained` (bool), both of shape [length]."""

    tokens: np.ndarray
    trained: np.ndarray
    row: Row


def load_tokenizer(base: Base, context: int) -> Any:
    """The base model's tokenizer, or a byte-level one for a model that is trained from scratch."""
    if not base.location:
        return byte_tokenizer(context)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.location, revision=base.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ForgeError(
            f"base model {base.location}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}"
        ) from None
    if not tokenizer.chat_template or "{% generation" not in tokenizer.chat_template.replace("{%-", "{%"):
        raise ForgeError(
            f"base model {base.location}: its chat template marks no {{% generation %}} block, so the assistant's "
            "tokens cannot be told from the others; put the assistant's turn into one in its chat_template.jinja"
        )
    return tokenizer


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and five special tokens, with a chat template."""
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
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


def encode(rows: Iterable[Row], tokenizer: Any) -> Iterator[Document]:
    """Render each conversation once, tokenise in batches, and map the assistant's characters to tokens."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield from _encode_batch(batch, tokenizer)
            batch = []
    yield from _encode_batch(batch, tokenizer)


def _encode_batch(rows: list[Row], tokenizer: Any) -> Iterator[Document]:
    if not rows:
        return
    texts, spans = render_jinja_template(
        [row.messages for row in rows],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    for row, encoding, assistant in zip(rows, encodings, spans, strict=True):
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        trained = np.zeros(len(starts), dtype=bool)
        for start, end in assistant:
            trained |= (starts >= start) & (ends <= end) & (ends > start)
        if not trained.any() or trained[0]:
            raise ForgeError(
                f"data {row.where}: the chat template leaves no assistant token to train on; mend the template"
            )
        yield Document(np.array(encoding.ids, dtype=np.uint32), trained, row)
