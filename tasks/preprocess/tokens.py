"""Rendered conversations to tokens: exactly those of the model's tokenizer, but several times faster.

Text repeats its words. Some tokenizers encode `␣word` the same way wherever it occurs: byte-level BPE with one of the
pre-tokenizers below, which never join a character and the space after it. With these, each piece is encoded once and
then looked up, together with its hash and whether it could be part of a credential. Other tokenizers encode the whole
text, and so does any tokenizer when a trained span begins or ends in an unusual place.
"""

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from forge.models.chat import trained_mask
from forge.models.chat_format import exact_tokenizer
from forge.models.conversation import Span
from tasks.preprocess.words import WORD, WordHashes

TRAINED = np.uint32(1 << 31)  # set in a token that is trained on
_WORD = np.uint32(WORD)
MOST_PIECES = 500_000  # cached by one process; about 150 MB

# Regular expressions that never split after a space, except inside white space: Llama 3 (cl100k), Qwen 2, o200k; GPT-2.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = (
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST,
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The pre-tokenizers also always split after the last line break before a word (except GPT-2's), between a letter and
# the punctuation after it, and between digits and punctuation. A piece not in the cache is built from such parts.
_LINES = re.compile(r"(?<=\n)(?=[^\s/])")
_NUMBER = re.compile(r"[^\w\s]*[0-9]+(?:[^\w\s]+[0-9]+)*[^\w\s]*")
_DIGITS = re.compile(r"(?<=[0-9])(?=[^0-9])|(?<=[^0-9])(?=[0-9])")
_TAIL = re.compile(r"(?<=[A-Za-z])[.,!?;:]+[\r\n]*\Z|(?<=[A-Za-z])[\r\n]+\Z")


class NotSplittable(Exception):
    """The tokens of this text cannot be built from those of its pieces."""


class Encoded(NamedTuple):
    """A text's tokens (uint32 [length], with TRAINED set in those that are trained), the number of trained ones, the
    hashes of its words (uint32 [words]), and whether one of the words could be part of a credential."""

    tokens: np.ndarray
    trained: int
    words: np.ndarray
    suspect: bool


class Encoder:
    """Encodes rendered texts with a tokenizer, given as its JSON (`Tokenizer.to_str()`)."""

    def __init__(self, serialized: str) -> None:
        self.tokenizer = exact_tokenizer(serialized)
        facts = json.loads(serialized)
        added = {token.content: number for number, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.by_pieces = bool(added) and splits_at_spaces(facts)
        longest_first = sorted(added, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) if added else "(?!)"
        self._split = re.compile(f"({alternatives})")
        # Runs of added tokens, with at most a role's name between them: what templates write between texts.
        self._split_runs = re.compile(rf"((?:{alternatives})(?:\w*(?:{alternatives}))*)")
        self._added = {content: array("I", [number]).tobytes() for content, number in added.items()}
        self._words = WordHashes()
        lines = _split_of(facts) != GPT2
        self._first = _Pieces(self.tokenizer, self._words, "", lines)
        self._later = _Pieces(self.tokenizer, self._words, " ", lines)
        self._later.first = self._first
        self._runs: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """Encode texts; TRAINED is set in the tokens of a text's trained spans, as `trained_mask` defines them."""
        encoded: list[Any] = [None] * len(texts)
        whole = []
        for at, (text, trained) in enumerate(zip(texts, spans, strict=True)):
            suspects = self._words.suspects
            try:
                if not self.by_pieces:
                    raise NotSplittable
                encoded[at] = _separated(self._from_pieces(text, trained), self._words.suspects > suspects)
            except NotSplittable:
                whole.append(at)
        encodings = self.tokenizer.encode_batch([texts[at] for at in whole], add_special_tokens=False)
        for at, encoding in zip(whole, encodings, strict=True):
            suspects = self._words.suspects
            words = b"".join(map(self._words.of, self._split.split(texts[at])[::2]))
            tokens = np.array(encoding.ids, dtype=np.uint32)
            tokens[trained_mask(encoding.offsets, spans[at])] |= TRAINED
            mixed = np.concatenate([tokens, np.frombuffer(words, dtype=np.uint32)])
            encoded[at] = _separated(mixed, self._words.suspects > suspects)
        return encoded

    def _from_pieces(self, text: str, spans: Sequence[Span]) -> np.ndarray:
        """Words and tokens, interleaved in the order of the text."""
        parts: list[bytes] = []
        starts, counts, firsts, runs = [], [], [], []  # per segment: first character, numbers before it, first piece
        at = count = 0
        for number, segment in enumerate(self._split_runs.split(text)):
            if not segment:
                continue
            starts.append(at)
            counts.append(count)
            at += len(segment)
            runs.append(number % 2 == 1)
            if number % 2:
                firsts.append(segment)
                found = self._run(segment)
            else:
                first, *later = segment.split(" ")
                firsts.append(first)
                found = self._first[first] + b"".join(map(self._later.__getitem__, later))
            parts.append(found)
            count += len(found) // 4

        def place(character: int) -> int:
            segment = bisect_right(starts, character) - 1
            within, first = character - starts[segment], firsts[segment]
            if within > len(first):
                raise NotSplittable
            if within == 0:
                return counts[segment]
            if runs[segment]:
                return counts[segment] + len(self._run(first[:within])) // 4
            return counts[segment] + self._first.place(first, within)

        both = np.frombuffer(bytearray(b"".join(parts)), dtype=np.uint32)
        for begin, end in spans:
            both[place(begin) : place(end) if end < at else count] |= TRAINED
        return both

    def _run(self, run: str) -> bytes:
        """Numbers of a run of added tokens; NotSplittable if it ends inside a piece."""
        if (found := self._runs.get(run)) is None:
            suspects = self._words.suspects
            pieces = self._split.split(run)
            names = [self._first[name] if name else b"" for name in pieces[::2]]
            tokens = [*map(self._added.__getitem__, pieces[1::2]), b""]
            found = b"".join(chain.from_iterable(zip(names, tokens, strict=True)))
            if len(self._runs) < MOST_PIECES and self._words.suspects == suspects:
                self._runs[run] = found
        return found


def _separated(mixed: np.ndarray, suspect: bool) -> Encoded:
    """Tokens and words, separated. The first token is never trained: there is nothing to predict it from."""
    is_token = (mixed & _WORD) == 0
    tokens, words = mixed[is_token], mixed[~is_token]
    tokens[:1] &= ~TRAINED
    words &= _WORD - np.uint32(1)
    return Encoded(tokens, int(np.count_nonzero(tokens >= TRAINED)), words, suspect)


class _Pieces(dict[str, bytes]):
    """Caches words and tokens (uint32) of pieces after a prefix; NotSplittable for a piece that depends on others."""

    first: "_Pieces"  # the cache for pieces that follow no space

    def __init__(self, tokenizer: Tokenizer, words: WordHashes, prefix: str, lines: bool) -> None:
        super().__init__()
        self._tokenizer, self._words, self._prefix, self._lines = tokenizer, words, prefix, lines
        self._places: dict[tuple[str, int], int] = {}
        self._parts: dict[str, bytes] = {}
        self.first = self

    def __missing__(self, piece: str) -> bytes:
        if not piece or piece[-1].isspace() or (self._prefix and piece[0].isspace()):
            raise NotSplittable
        return self._part(piece)

    def _part(self, piece: str) -> bytes:
        suspects = self._words.suspects
        if self._lines and len(lines := _LINES.split(piece)) > 1:
            found = self._known(lines[0]) + b"".join(map(self.first._known, lines[1:]))
        elif _NUMBER.fullmatch(piece) and len(parts := _DIGITS.split(piece)) > 1:
            numbers = b"".join([self._tokens_of(parts[0]), *map(self.first._tokens_of, parts[1:])])
            return self._words.of(piece) + numbers  # not cached: few numbers repeat
        elif (tail := _TAIL.search(piece)) and (self._lines or not piece[-1].isspace()):
            found = self._known(piece[: tail.start()]) + self.first._known(tail.group())
        else:
            ids = self._tokenizer.encode(self._prefix + piece, add_special_tokens=False).ids
            found = self._words.of(piece) + array("I", ids).tobytes()
        if len(self) < MOST_PIECES and self._words.suspects == suspects:
            self[piece] = found
        return found

    def _tokens_of(self, part: str) -> bytes:
        """The tokens of digits or marks, without their word."""
        if (tokens := self._parts.get(part)) is None:
            ids = self._tokenizer.encode(self._prefix + part, add_special_tokens=False).ids
            tokens = array("I", ids).tobytes()
            if len(self._parts) < MOST_PIECES:
                self._parts[part] = tokens
        return tokens

    def _known(self, part: str) -> bytes:
        return self.get(part) or self._part(part)

    def place(self, piece: str, character: int) -> int:
        """How many of a piece's numbers come before the first token that starts at or after a character."""
        if (place := self._places.get((piece, character))) is not None:
            return place
        if self._lines and piece[character - 1] == "\n" and _LINES.match(piece, character):
            place = len(self._known(piece[:character])) // 4
        else:
            offsets = self._tokenizer.encode(self._prefix + piece, add_special_tokens=False).offsets
            before = sum(start < character for start, _ in offsets)
            tokens = np.flatnonzero((np.frombuffer(self[piece], dtype=np.uint32) & _WORD) == 0)
            place = int(tokens[before]) if before < len(tokens) else len(self[piece]) // 4
        if len(self._places) < MOST_PIECES:
            self._places[piece, character] = place
        return place


def splits_at_spaces(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer (its JSON) always encodes a space and the text up to the next space independently."""
    model, normalizer = tokenizer["model"], tokenizer["normalizer"]
    plain = (
        model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("unk_token")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and (normalizer is None or normalizer == {"type": "NFC"})
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or (token["normalized"] and normalizer)
            for token in tokenizer["added_tokens"]
        )
    )
    if not plain or not tokenizer["pre_tokenizer"]:
        return False
    match _steps(tokenizer["pre_tokenizer"]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return True
        case [{"type": "ByteLevel", "add_prefix_space": False}]:
            return not model["merges"]
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern in (*SPLITS, GPT2)
    return False


def _split_of(tokenizer: dict[str, Any]) -> str:
    """The regular expression that a tokenizer splits by, or "" if unknown."""
    match _steps(tokenizer["pre_tokenizer"] or {"type": "none"}):
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}}, *_]:
            return pattern
        case [{"type": "ByteLevel", "use_regex": True}]:
            return GPT2
    return ""


def _steps(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
