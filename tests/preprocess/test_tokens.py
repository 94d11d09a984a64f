"""Tokens built from cached pieces are exactly those of the tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from forge.models.chat import byte_tokenizer
from tasks.preprocess.tokens import GPT2, SPLITS, TRAINED, Encoder, splits_at_spaces
from tests.preprocess.tokenizers import TEXTS, gemma, llama3

SPECIALS = ["<|eot|>", "<|head|>"]


def bpe(split: str) -> str:
    """A byte-level BPE with a pre-tokenizer's regular expression, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(["  two  spaces\n\n and\tmore 'll  \r\n", *TEXTS], trainer)
    return tokenizer.to_str()


ENCODERS = [Encoder(bpe(split)) for split in (*SPLITS, GPT2)]
BYTES = Encoder(byte_tokenizer(64).backend_tokenizer.to_str())
# Words, white space and punctuation of all kinds, and any other characters.
PIECES = st.one_of(
    st.sampled_from(
        ["the", "it's", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\x1c", "\x85", "!", "42",
         "1,234", "3.14%", "€7", "(", "–", "é", "e\u0301", "日本", "'ll", "'", "/", ".\n", "🚆", *SPECIALS]
    ),
    st.text(max_size=3),
)  # fmt: skip
TEXT = st.lists(PIECES, max_size=24).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXT)
def test_tokens_from_pieces_equal_the_tokenizers(text: str) -> None:
    for encoder in [*ENCODERS, BYTES]:
        assert encoder.by_pieces
        (encoded,) = encoder.encode([text], [[]])
        assert encoded.tokens.tolist() == encoder.tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT, TEXT)
def test_pieces_and_offsets_agree_on_trained_tokens(before: str, answer: str, after: str) -> None:
    text = f"{before}<|head|>\n\n{answer}<|eot|>{after}"
    begin = len(before) + len("<|head|>\n\n")
    span = (begin, begin + len(answer) + len("<|eot|>"))
    for encoder in ENCODERS:
        (encoded,) = encoder.encode([text], [[span]])
        encoding = encoder.tokenizer.encode(text, add_special_tokens=False)
        expected = [span[0] <= start < end <= span[1] for start, end in encoding.offsets]
        assert ((encoded.tokens & TRAINED) > 0).tolist() == expected


def test_other_tokenizers_encode_the_whole_text() -> None:
    encoder = Encoder(gemma().backend_tokenizer.to_str())
    assert not encoder.by_pieces
    text = "<start_of_turn>user\nThe train<end_of_turn>\n"
    (encoded,) = encoder.encode([text], [[(20, 29)]])
    assert (encoded.tokens & ~TRAINED).tolist() == encoder.tokenizer.encode(text, add_special_tokens=False).ids
    assert ((encoded.tokens & TRAINED) > 0).sum() > 0


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"pre_tokenizer": None},
        {"model": {"type": "Unigram"}},
        {"model": {"dropout": 0.1}},
        {"model": {"unk_token": "<unk>"}},
    ],
)
def test_a_tokenizer_not_known_to_split_at_spaces_is_recognized(change: dict) -> None:
    known = json.loads(llama3().backend_tokenizer.to_str())
    assert splits_at_spaces(known)
    if "model" in change:
        change = {"model": {**known["model"], **change["model"]}}
    assert not splits_at_spaces({**known, **change})


def test_added_tokens_that_absorb_spaces_are_recognized() -> None:
    known = json.loads(llama3().backend_tokenizer.to_str())
    known["added_tokens"][0]["rstrip"] = True
    assert not splits_at_spaces(known)


def test_a_document_is_uint32_and_can_be_written_to() -> None:
    (encoded,) = BYTES.encode(["a<|end|>"], [[(0, 8)]])
    assert encoded.tokens.dtype == np.uint32
    encoded.tokens[0] = 1
