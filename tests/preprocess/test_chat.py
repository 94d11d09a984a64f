"""The trained tokens are the assistants' words and their end of turn, and nothing else."""

import numpy as np
import pytest

from tasks.contracts import Base
from tasks.errors import ForgeError
from tasks.preprocess.chat import byte_tokenizer, encode, load_tokenizer
from tasks.preprocess.rows import Row


def row(*contents: str, system: str = "") -> Row:
    """A conversation of the given turns, the user's first."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return Row([{"role": "system", "content": system}, *messages] if system else messages, "g", "s", "rows.jsonl:1")


@pytest.mark.parametrize(
    ("conversation", "trained"),
    [
        (row("hello", "good day"), "good day<|end|>"),
        (row("één ✓", "twee – 日本"), "twee – 日本<|end|>"),
        (row("a", "b", "c", "d", system="be brief"), "b<|end|>d<|end|>"),
    ],
)
def test_trained_tokens_are_the_assistants_words(conversation: Row, trained: str) -> None:
    tokenizer = byte_tokenizer(128)
    (document,) = encode([conversation], tokenizer)
    assert tokenizer.decode(document.tokens[document.trained]) == trained
    assert tokenizer.decode(document.tokens) == "".join(
        f"<|{message['role']}|>{message['content']}<|end|>" for message in conversation.messages
    )
    assert document.tokens.dtype == np.uint32


def test_batches_keep_the_order() -> None:
    rows = [row(f"question {number}", f"answer {number}") for number in range(2500)]
    documents = list(encode(rows, byte_tokenizer(128)))
    assert [document.row for document in documents] == rows


def test_a_template_without_a_generation_block_is_refused(tmp_path) -> None:
    tokenizer = byte_tokenizer(128)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ForgeError, match="generation"):
        load_tokenizer(Base(location=str(tmp_path)), 128)


def test_a_base_without_a_tokenizer_is_named(tmp_path) -> None:
    with pytest.raises(ForgeError, match=str(tmp_path)):
        load_tokenizer(Base(location=str(tmp_path)), 128)
