"""One process's share of reading: turns blocks of raw rows into tokens on disk and a table of documents.

A document is the unit of packing: a row, or a piece of a row that was split. Its tokens, the hashes of its words and,
if it is held out, its JSON go to files that only this process writes (spills); the table says where.
"""

import gc
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from forge.core.recipe import DataRecipe
from forge.models.chat_format import ChatFormat, has_scorable_answer
from forge.models.conversation import Rendered, Renderer
from tasks.preprocess.file_formats import Block
from tasks.preprocess.messages import ROLES
from tasks.preprocess.render import reject_control_tokens, render_rows
from tasks.preprocess.row_formats import RowFormat, other_row_format, row_format_named, to_row
from tasks.preprocess.rows import Invalid, Row, canonical, digests
from tasks.preprocess.secrets import reject_secret
from tasks.preprocess.tokens import TRAINED, Encoded, Encoder
from tasks.preprocess.words import SHINGLE, signatures

Side = Literal["both", "train", "heldout"]
SPILLS = ("tokens", "words", "rows", "signatures")
DOCUMENT = np.dtype(
    [
        ("key", "S16"),  # digest of content, group and slice: the sort key
        ("content", "S16"),  # digest of what the model learns from
        ("heldout", "?"),
        ("scorable", "?"),  # evaluation can score the last answer
        ("slice", "u4"),
        ("roles", "u2", len(ROLES)),  # messages of each role
        ("length", "u4"),  # tokens
        ("trained", "u4"),  # tokens that are targets
        ("cut", "u4"),  # tokens that were truncated
        ("spill", "u2"),  # index of the process's files
        *((f"{name}_at", "u8") for name in SPILLS),  # byte offsets into them
        ("words_size", "u4"),  # bytes
        ("rows_size", "u4"),
    ]
)
NO_SIGNATURE = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class ReadJob:
    """What every process needs to know."""

    recipe: DataRecipe
    form: ChatFormat
    where: str  # the base model's name, for messages
    directory: Path  # for the spills


@dataclass(frozen=True)
class BlockResult:
    """The result of a block. `documents["slice"]` is an index into `slices`; rejects are (number, reason, message)."""

    block: Block  # without its rows
    rows: int
    documents: np.ndarray
    slices: list[str]
    spill: str
    rejected: list[tuple[int, str, str]]
    other_shape: tuple[int, str] | None  # the first row whose format is not the source's: its number, its format
    ignored: Counter[str]
    turns: Counter[str]  # messages that are changed, dropped or not trained, by reason
    ends: Counter[str]  # control tokens that end trained turns


def in_heldout(group: str, fraction: float) -> bool:
    """Whether a group is held out. Only its hash decides, so new rows never move old ones across the split."""
    number = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    return number < int(fraction * 2**64)


UNTRAINED = "not trained: their weight is 0"
DIFFERING = "not trained: the chat template renders them differently later, for example without their reasoning"


class CandidateRow(NamedTuple):
    """A valid row, or a piece of one that was split: the row's number, its side of the split and its digests."""

    number: int
    row: Row
    heldout: bool
    content: bytes
    key: bytes


class EncodedDocument(NamedTuple):
    """A candidate with its tokens; those beyond `length` are truncated."""

    source: CandidateRow
    rendered: Rendered
    encoded: Encoded
    length: int


class Worker:
    """Reads blocks for a job. One per process."""

    def __init__(self, job: ReadJob) -> None:
        self.job = job
        self.renderer = Renderer(job.form, job.where)
        self.encoder = Encoder(job.form.tokenizer)
        self.spill = str(os.getpid())
        self.files = {name: (job.directory / f"{self.spill}.{name}").open("ab") for name in SPILLS}

    def read(self, block: Block, row_format: RowFormat, side: Side) -> BlockResult:
        """Check, render and tokenise a block's rows, and write their documents."""
        rejected: list[tuple[int, str, str]] = []
        other_shape: tuple[int, str] | None = None
        counts: dict[int, tuple[Counter[str], Counter[str]]] = {}  # of each row's unused columns and changed messages
        candidates: list[CandidateRow] = []
        count = 0
        for number, value in block.values():
            count += 1
            try:
                if other := other_row_format(value, row_format, self.job.recipe):
                    other_shape = other_shape or (number, other.name)
                    continue
                counted: tuple[Counter[str], Counter[str]] = Counter(), Counter()
                row = to_row(value, row_format, self.job.recipe, *counted)
                candidates.append(self._candidate(number, row, side))
                if any(counted):
                    counts[number] = counted
            except Invalid as invalid:
                rejected.append((number, invalid.reason, invalid.message))
        made = self._encode(candidates, rejected)
        documents, slices = self._write(made)
        for number, _, _ in rejected:
            counts.pop(number, None)
        ignored: Counter[str] = Counter()
        turns: Counter[str] = Counter()
        for unused, changed in counts.values():
            ignored.update(unused)
            turns.update(changed)
        ends: Counter[str] = Counter()
        for document in made:
            turns[UNTRAINED] += len(document.source.row.untrained)
            turns[DIFFERING] += len(document.rendered.differing)
            ends.update(document.rendered.ends)
        for file in self.files.values():
            file.flush()
        header = Block(block.order, block.name, block.first, [])
        return BlockResult(
            header, count, documents, slices, self.spill, sorted(rejected), other_shape, ignored, +turns, ends
        )

    def _candidate(self, number: int, row: Row, side: Side) -> CandidateRow:
        content, key = digests(row)
        if side == "both":
            side = "heldout" if in_heldout(row.group, self.job.recipe.heldout_fraction) else "train"
        return CandidateRow(number, row, side == "heldout", content, key)

    def _encode(self, rows: list[CandidateRow], rejected: list[tuple[int, str, str]]) -> list[EncodedDocument]:
        """Tokenise rows; those that must be split are split until each piece fits.

        A row is rejected as a whole, once, if any of its pieces is.
        """
        documents: list[EncodedDocument] = []
        bad: set[int] = set()
        while rows:
            pieces: list[CandidateRow] = []
            rendered = render_rows(self.renderer, [candidate.row for candidate in rows])
            texts = [Rendered("", []) if isinstance(one, Invalid) else one for one in rendered]
            batch = self.encoder.encode([one.text for one in texts], [one.spans for one in texts])
            for candidate, one, encoded in zip(rows, rendered, batch, strict=True):
                try:
                    if isinstance(one, Invalid):
                        raise one
                    self._check(candidate.row, encoded)
                    parts = self._parts(candidate.row, len(encoded.tokens))
                    if parts[0] is candidate.row:
                        documents.append(self._fit(candidate, one, encoded))
                    else:
                        side: Side = "heldout" if candidate.heldout else "train"
                        pieces += [self._candidate(candidate.number, part, side) for part in parts]
                except Invalid as invalid:
                    if candidate.number not in bad:
                        rejected.append((candidate.number, invalid.reason, invalid.message))
                        bad.add(candidate.number)
            rows = pieces
        return [document for document in documents if document.source.number not in bad]

    def _check(self, row: Row, encoded: Encoded) -> None:
        """Raise Invalid if a row holds a credential or one of the model's control tokens."""
        # The rendered text may leave out parts of such a row, so its suspicious words say too little.
        unusual = row.tools or any(len(message) > 2 for message in row.messages)
        if (encoded.suspect or unusual) and self.job.recipe.secrets == "reject":
            reject_secret("\n".join(row.texts()))
        reject_control_tokens(self.renderer, row)

    def _parts(self, row: Row, length: int) -> list[Row]:
        recipe = self.job.recipe
        return split_row(row) if length > recipe.max_seq_len and recipe.overlong == "split" else [row]

    def _fit(self, candidate: CandidateRow, rendered: Rendered, encoded: Encoded) -> EncodedDocument:
        """The document of a row, at most max_seq_len tokens long."""
        limit, policy = self.job.recipe.max_seq_len, self.job.recipe.overlong
        length = len(encoded.tokens)
        if length > limit:
            if policy != "truncate" or candidate.heldout:
                what = "one turn alone is" if policy == "split" else "it is"
                raise Invalid(
                    "over the context",
                    f"{what} {length} tokens long, and data.max_seq_len is {limit}; shorten it, raise the limit"
                    + (", or set data.overlong" if policy == "reject" else ""),
                )
            encoded = encoded._replace(trained=int(np.count_nonzero(encoded.tokens[:limit] & TRAINED)))
        if not encoded.trained:
            raise Invalid(
                "nothing to train", "no assistant token is left to train on; fix the row or the chat template"
            )
        return EncodedDocument(candidate, rendered, encoded, min(length, limit))

    def _write(self, made: list[EncodedDocument]) -> tuple[np.ndarray, list[str]]:
        """Append the documents to the spills; returns their table [len(made)] of DOCUMENT, and the names of slices."""
        documents = np.zeros(len(made), dtype=DOCUMENT)
        if not made:
            return documents, []
        slices: dict[str, int] = {}
        sources = [document.source for document in made]
        documents["key"] = [source.key for source in sources]
        documents["content"] = [source.content for source in sources]
        documents["heldout"] = [source.heldout for source in sources]
        documents["scorable"] = [has_scorable_answer(source.row.messages, source.row.untrained) for source in sources]
        documents["slice"] = [slices.setdefault(source.row.slice, len(slices)) for source in sources]
        documents["roles"] = [_roles(source.row) for source in sources]
        documents["length"] = [document.length for document in made]
        documents["trained"] = [document.encoded.trained for document in made]
        documents["cut"] = [len(document.encoded.tokens) - document.length for document in made]
        rows = [canonical(heldout_row(source.row)) + b"\n" if source.heldout else b"" for source in sources]
        words = np.concatenate([document.encoded.words for document in made])
        counts = np.array([len(document.encoded.words) for document in made])
        tokens = np.concatenate([document.encoded.tokens[: document.length] for document in made])
        documents["words_size"], documents["rows_size"] = 4 * counts, [len(row) for row in rows]
        for name, sizes, data in (
            ("tokens", 4 * documents["length"].astype(np.int64), tokens.data),
            ("words", 4 * counts, words.data),
            ("rows", documents["rows_size"].astype(np.int64), b"".join(rows)),
        ):
            documents[f"{name}_at"] = self.files[name].tell() + np.cumsum(sizes) - sizes
            self.files[name].write(data)
        if self.job.recipe.near_duplicates:
            signed = signatures(words, counts)
            documents["signatures_at"] = self.files["signatures"].tell() + np.arange(len(made)) * signed.strides[0]
            documents["signatures_at"][counts < SHINGLE] = NO_SIGNATURE
            self.files["signatures"].write(signed.data)
        return documents, list(slices)


def heldout_row(row: Row) -> dict[str, Any]:
    """A held-out row as evaluation reads it."""
    check = {"check": json.loads(row.check)} if row.check else {}
    return {**row.content, "group": row.group, "slice": row.slice, **check}


def _roles(row: Row) -> list[int]:
    counts = [0] * len(ROLES)
    for message in row.messages:
        counts[ROLES.index(message["role"])] += 1
    return counts


def split_row(row: Row) -> list[Row]:
    """Split a row in two: a conversation between turns, a text between words. [row] if that is impossible.

    A half that has nothing to train is left out. The row's check is that of its last answer.
    """
    if row.text is not None:
        middle = row.text.find(" ", len(row.text) // 2)
        halves = [row.text[:middle], row.text[middle:]]
        if middle < 0 or not all(half.strip() for half in halves):
            return [row]
        return [replace(row, text=half) for half in halves]
    system = [message for message in row.messages if message["role"] == "system"]
    turns = row.messages[len(system) :]
    starts = [index for index, message in enumerate(turns) if message["role"] == "user"]
    if len(starts) == 1:
        return [row]
    head = len(system)
    middle = head + starts[len(starts) // 2]
    parts = []
    for first, end, check in ((head, middle, ""), (middle, len(row.messages), row.check)):
        untrained = tuple(at - first + head for at in row.untrained if first <= at < end)
        if sum(message["role"] == "assistant" for message in row.messages[first:end]) > len(untrained):
            parts.append(replace(row, messages=system + row.messages[first:end], check=check, untrained=untrained))
    return parts


_worker: Worker | None = None


def start(job: ReadJob) -> None:
    """Initialise a pool's process. It exits when its parent does, and leaves Ctrl-C to the parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    _worker = Worker(job)
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)  # rows form no cycles: looking for them takes a tenth of the time


def read_block(block: Block, row_format: str, side: Side) -> BlockResult:
    """Read a block in this worker process."""
    if _worker is None:
        raise RuntimeError("start was not called")
    return _worker.read(block, row_format_named(row_format), side)
