"""From rendered conversations to tokens, exactly as the model's own tokenizer has them, only faster.

Text repeats its words. Where a tokenizer is known to treat `␣word` the same wherever it stands (byte-level BPE with
the pre-tokenizers below, which never join a character and the space after it), each piece is given to the tokenizer
once and then looked up; this is several times as fast as encoding whole texts. All other tokenizers, and texts whose
trained parts begin or end in unusual places, go through the tokenizer as they are. What else is to be known of a word,
its hash and whether it could be part of a credential, is looked up with it.
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

from tasks.preprocess.words import WORD, WordHashes

TRAINED = np.uint32(1 << 31)  # the highest bit of a token: it is a target
_WORD = np.uint32(WORD)
MOST_PIECES = 500_000  # remembered by one process, some 150 MB

# Regular expressions that split before a space or around white space only: Llama 3 (cl100k), Qwen 2, o200k; GPT-2.
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
# Where the pre-tokenizers also split always: after the last line break before a word (but for GPT-2's), between a
# letter and the marks behind it, and between digits and marks: what was not met before is put together from parts.
_LINES = re.compile(r"(?<=\n)(?=[^\s/])")
_NUMBER = re.compile(r"[^\w\s]*[0-9]+(?:[^\w\s]+[0-9]+)*[^\w\s]*")
_DIGITS = re.compile(r"(?<=[0-9])(?=[^0-9])|(?<=[^0-9])(?=[0-9])")
_TAIL = re.compile(r"(?<=[A-Za-z])[.,!?;:]+[\r\n]*\Z|(?<=[A-Za-z])[\r\n]+\Z")
Span = tuple[int, int]


class NotApart(Exception):
    """This text cannot be put together from pieces."""


class Encoded(NamedTuple):
    """A text's tokens (uint32 [length], those that are trained with TRAINED) and how many are trained, its words'
    hashes (uint32 [words]), and whether one of the words could be part of a credential."""

    tokens: np.ndarray
    trained: int
    words: np.ndarray
    suspect: bool


class Encoder:
    """Encodes rendered texts with a tokenizer (its JSON, as `tokenizer.to_str()` gives it)."""

    def __init__(self, serialized: str) -> None:
        self.tokenizer = Tokenizer.from_str(serialized)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.post_processor = None  # templates write special tokens; some processors falsify offsets
        facts = json.loads(serialized)
        added = {token.content: number for number, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.by_pieces = bool(added) and splits_at_spaces(facts)
        longest_first = sorted(added, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) if added else "(?!)"
        self._split = re.compile(f"({alternatives})")
        # Added tokens one after another, or with a role's name between them: as templates have them between texts.
        self._split_runs = re.compile(rf"((?:{alternatives})(?:\w*(?:{alternatives}))*)")
        self._added = {content: array("I", [number]).tobytes() for content, number in added.items()}
        self._words = WordHashes()
        lines = _split_of(facts) != GPT2
        self._first = _Pieces(self.tokenizer, self._words, "", lines)
        self._later = _Pieces(self.tokenizer, self._words, " ", lines)
        self._later.first = self._first
        self._runs: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """Encode texts; tokens within a text's trained spans (characters) bear TRAINED, but for a text's first."""
        encoded: list[Any] = [None] * len(texts)
        whole = []
        for at, (text, trained) in enumerate(zip(texts, spans, strict=True)):
            suspects = self._words.suspects
            try:
                if not self.by_pieces:
                    raise NotApart
                encoded[at] = _apart(self._from_pieces(text, trained), self._words.suspects > suspects)
            except NotApart:
                whole.append(at)
        encodings = self.tokenizer.encode_batch([texts[at] for at in whole], add_special_tokens=False)
        for at, encoding in zip(whole, encodings, strict=True):
            suspects = self._words.suspects
            words = b"".join(map(self._words.of, self._split.split(texts[at])[::2]))
            mixed = np.concatenate([_whole(encoding, spans[at]), np.frombuffer(words, dtype=np.uint32)])
            encoded[at] = _apart(mixed, self._words.suspects > suspects)
        return encoded

    def _from_pieces(self, text: str, spans: Sequence[Span]) -> np.ndarray:
        """Words and tokens, mixed as they come."""
        parts: list[bytes] = []
        starts, counts, firsts, runs = [], [], [], []  # of each segment: first character, numbers before, first piece
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
                raise NotApart
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
        """Numbers of a run of added tokens; NotApart where it ends in the middle of something else."""
        if (found := self._runs.get(run)) is None:
            suspects = self._words.suspects
            pieces = self._split.split(run)
            names = [self._first[name] if name else b"" for name in pieces[::2]]
            tokens = [*map(self._added.__getitem__, pieces[1::2]), b""]
            found = b"".join(chain.from_iterable(zip(names, tokens, strict=True)))
            if len(self._runs) < MOST_PIECES and self._words.suspects == suspects:
                self._runs[run] = found
        return found


def _apart(mixed: np.ndarray, suspect: bool) -> Encoded:
    """Tokens and words, each by themselves. The first token is not trained: nothing before it tells it."""
    is_token = (mixed & _WORD) == 0
    tokens, words = mixed[is_token], mixed[~is_token]
    tokens[:1] &= ~TRAINED
    words &= _WORD - np.uint32(1)
    return Encoded(tokens, int(np.count_nonzero(tokens >= TRAINED)), words, suspect)


class _Pieces(dict[str, bytes]):
    """Words and tokens (uint32) of pieces that follow a prefix, remembered; NotApart where one cannot stand alone."""

    first: "_Pieces"  # of pieces that follow no space

    def __init__(self, tokenizer: Tokenizer, words: WordHashes, prefix: str, lines: bool) -> None:
        super().__init__()
        self._tokenizer, self._words, self._prefix, self._lines = tokenizer, words, prefix, lines
        self._places: dict[tuple[str, int], int] = {}
        self._parts: dict[str, bytes] = {}
        self.first = self

    def __missing__(self, piece: str) -> bytes:
        if not piece or piece[-1].isspace() or (self._prefix and piece[0].isspace()):
            raise NotApart
        return self._part(piece)

    def _part(self, piece: str) -> bytes:
        suspects = self._words.suspects
        if self._lines and len(lines := _LINES.split(piece)) > 1:
            found = self._known(lines[0]) + b"".join(map(self.first._known, lines[1:]))
        elif _NUMBER.fullmatch(piece) and len(parts := _DIGITS.split(piece)) > 1:
            numbers = b"".join([self._tokens_of(parts[0]), *map(self.first._tokens_of, parts[1:])])
            return self._words.of(piece) + numbers  # not remembered: few numbers come twice
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
        """How many numbers of a piece's stand before the first token that starts at a character or behind it."""
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


def _whole(encoding: Any, spans: Sequence[Span]) -> np.ndarray:
    document = np.array(encoding.ids, dtype=np.uint32)
    starts = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
    for begin, end in spans:
        # By where a token starts: that of the end of a turn may take the line break behind it.
        document[(starts >= begin) & (starts < end)] |= TRAINED
    return document


def splits_at_spaces(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer (its JSON) always treats a space and what follows it, up to the next space, by themselves."""
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
    """The regular expression by which a tokenizer splits, as far as it is known."""
    match _steps(tokenizer["pre_tokenizer"] or {"type": "none"}):
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}}, *_]:
            return pattern
        case [{"type": "ByteLevel", "use_regex": True}]:
            return GPT2
    return ""


def _steps(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
