"""One process's share of reading: blocks of raw rows to tokens on disk, and a table of what was found.

A document is what is packed: a row, or a piece of one that was split. Its tokens, the hashes of its words and, if it
is held out, its JSON go to files that only this process writes; the table says where they are.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from forge.core.recipe import DataRecipe
from tasks.preprocess.chat import ChatFormat, Renderer
from tasks.preprocess.formats import Block
from tasks.preprocess.rows import ROLES, Invalid, Row, canonical, digests
from tasks.preprocess.secrets import refuse_secret
from tasks.preprocess.shapes import RowFormat, detect, shape_named, to_row, unknown_shape
from tasks.preprocess.tokens import TRAINED, Encoded, Encoder
from tasks.preprocess.words import SHINGLE, signatures

Side = Literal["both", "train", "heldout"]
SPILLS = ("tokens", "words", "rows", "signatures")
DOCUMENT = np.dtype(
    [
        ("key", "S16"),  # of content, group and slice: what documents are ordered by
        ("content", "S16"),  # of what the model learns from
        ("heldout", "?"),
        ("slice", "u2"),
        ("roles", "u2", len(ROLES)),  # messages of each role
        ("length", "u4"),  # tokens
        ("trained", "u4"),  # tokens that are targets
        ("cut", "u4"),  # tokens that were cut off
        ("spill", "u2"),  # which process's files
        *((f"{name}_at", "u8") for name in SPILLS),  # bytes into them
        ("words_size", "u4"),  # bytes
        ("rows_size", "u4"),
    ]
)


@dataclass(frozen=True)
class ReadJob:
    """What every process is told once."""

    recipe: DataRecipe
    form: ChatFormat
    where: str  # the base model's name, for messages
    directory: Path  # for the files


@dataclass(frozen=True)
class BlockResult:
    """What a block came to. `documents["slice"]` counts into `slices`; refusals are (number, reason, message)."""

    block: Block  # without its rows
    rows: int
    documents: np.ndarray
    slices: list[str]
    spill: str
    refused: list[tuple[int, str, str]]
    other_shape: tuple[int, str] | None  # the first row that is of another shape than the source's
    ignored: Counter[str]


def in_heldout(group: str, fraction: float) -> bool:
    """Which side of the split a group is on: by its hash alone, so that adding rows moves none."""
    number = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    return number < int(fraction * 2**64)


class CandidateRow(NamedTuple):
    """A row that may be trained on, or a piece of one that was split: its row's number, its side and its digests."""

    number: int
    row: Row
    heldout: bool
    content: bytes
    key: bytes


class EncodedDocument(NamedTuple):
    """A candidate as it was encoded; tokens behind `length` are cut off."""

    of: CandidateRow
    encoded: Encoded
    length: int


class Worker:
    """Reads blocks for a job. One a process."""

    def __init__(self, job: ReadJob) -> None:
        self.job = job
        self.renderer = Renderer(job.form, job.where)
        self.encoder = Encoder(job.form.tokenizer)
        self.spill = str(os.getpid())
        self.files = {name: (job.directory / f"{self.spill}.{name}").open("ab") for name in SPILLS}

    def read(self, block: Block, shape: RowFormat, side: Side) -> BlockResult:
        """Check, render and tokenise a block's rows, and write what they came to."""
        refused: list[tuple[int, str, str]] = []
        other_shape: tuple[int, str] | None = None
        ignored: Counter[str] = Counter()
        rows: list[CandidateRow] = []
        count = 0
        for number, value in block.values():
            count += 1
            try:
                if isinstance(value, Invalid):
                    raise value
                if self.job.recipe.row_format == "auto" and (other := detect(value)) is not shape:
                    if other is None:
                        raise unknown_shape(value)
                    other_shape = other_shape or (number, other.name)
                    continue
                rows.append(self._check(number, to_row(value, shape, self.job.recipe, ignored), side))
            except Invalid as reason:
                refused.append((number, reason.reason, reason.message))
        documents, slices = self._documents(rows, refused)
        for file in self.files.values():
            file.flush()
        header = Block(block.order, block.name, block.first, [])
        return BlockResult(header, count, documents, slices, self.spill, sorted(refused), other_shape, ignored)

    def _check(self, number: int, row: Row, side: Side) -> CandidateRow:
        content, key = digests(row)
        if side == "both":
            side = "heldout" if in_heldout(row.group, self.job.recipe.heldout_fraction) else "train"
        return CandidateRow(number, row, side == "heldout", content, key)

    def _documents(self, rows: list[CandidateRow], refused: list[tuple[int, str, str]]) -> tuple[np.ndarray, list[str]]:
        """Tokenise rows, the pieces of those that are split included, and write them.

        A row of which one piece is refused is refused as a whole, once.
        """
        made: list[EncodedDocument] = []
        bad: set[int] = set()
        while rows:
            pieces: list[CandidateRow] = []
            rendered = self.renderer.render([candidate.row for candidate in rows])
            texts = [("", []) if isinstance(text, Invalid) else text for text in rendered]
            encoded = self.encoder.encode([text for text, _ in texts], [spans for _, spans in texts])
            for candidate, text, found in zip(rows, rendered, encoded, strict=True):
                try:
                    if isinstance(text, Invalid):
                        raise text
                    self._refuse(candidate.row, found)
                    parts = self._parts(candidate.row, len(found.tokens))
                    if len(parts) == 1:
                        made.append(self._fit(candidate, found))
                    else:
                        side: Side = "heldout" if candidate.heldout else "train"
                        pieces += [self._check(candidate.number, part, side) for part in parts]
                except Invalid as reason:
                    if candidate.number not in bad:
                        refused.append((candidate.number, reason.reason, reason.message))
                        bad.add(candidate.number)
            rows = pieces
        return self._write([document for document in made if document.of.number not in bad])

    def _refuse(self, row: Row, found: Encoded) -> None:
        """Raise Invalid if a model should not learn a row."""
        unusual = row.tools or any(len(message) > 2 for message in row.messages)  # templates may not render all of it
        if (found.suspect or unusual) and self.job.recipe.secrets == "reject":
            refuse_secret("\n".join(row.texts()))
        if token := self.renderer.special_in(row.texts()):
            raise Invalid(
                "control token", f"a text holds the model's control token {token}, which it would not read as text"
            )

    def _parts(self, row: Row, length: int) -> list[Row]:
        recipe = self.job.recipe
        return split_row(row) if length > recipe.max_seq_len and recipe.overlong == "split" else [row]

    def _fit(self, candidate: CandidateRow, found: Encoded) -> EncodedDocument:
        """The document, within the context."""
        limit, policy = self.job.recipe.max_seq_len, self.job.recipe.overlong
        length, trained = len(found.tokens), found.trained
        if length > limit:
            if policy != "truncate" or candidate.heldout:
                what = "one turn alone is" if policy == "split" else "it is"
                raise Invalid(
                    "over the context",
                    f"{what} {length} tokens long, and data.max_seq_len is {limit}; shorten it, raise the limit"
                    + (", or set data.overlong" if policy == "reject" else ""),
                )
            found = found._replace(trained=int(np.count_nonzero(found.tokens[:limit] & TRAINED)))
            trained = found.trained
        if not trained:
            raise Invalid(
                "nothing to train", "no token of an assistant's is left to train on; mend the row or the chat template"
            )
        return EncodedDocument(candidate, found, min(length, limit))

    def _write(self, made: list[EncodedDocument]) -> tuple[np.ndarray, list[str]]:
        documents = np.zeros(len(made), dtype=DOCUMENT)
        if not made:
            return documents, []
        slices: dict[str, int] = {}
        rows = [
            canonical(heldout_row(of.row)) + b"\n" if of.heldout else b"" for of in (document.of for document in made)
        ]
        documents["key"] = [document.of.key for document in made]
        documents["content"] = [document.of.content for document in made]
        documents["heldout"] = [document.of.heldout for document in made]
        documents["slice"] = [slices.setdefault(document.of.row.slice, len(slices)) for document in made]
        documents["roles"] = [_roles(document.of.row) for document in made]
        documents["length"] = [document.length for document in made]
        documents["trained"] = [document.encoded.trained for document in made]
        documents["cut"] = [len(document.encoded.tokens) - document.length for document in made]
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
    """What evaluation gets to see of a row."""
    judged = {"check": json.loads(row.check)} if row.check else {}
    return {**row.content, "group": row.group, "slice": row.slice, **judged}


def _roles(row: Row) -> list[int]:
    counts = [0] * len(ROLES)
    for message in row.messages:
        counts[ROLES.index(message["role"])] += 1
    return counts


NO_SIGNATURE = np.iinfo(np.uint64).max


def split_row(row: Row) -> list[Row]:
    """A row in two: a conversation between turns, a text between words; the row alone where it cannot be."""
    if row.text is not None:
        middle = row.text.find(" ", len(row.text) // 2)
        halves = [row.text[:middle], row.text[middle:]] if middle > 0 else [row.text]
        if not all(half.strip() for half in halves):
            return [row]
        return [Row([], None, half, row.group, row.slice) for half in halves]
    system = [message for message in row.messages if message["role"] == "system"]
    turns = row.messages[len(system) :]
    begins = [at for at, message in enumerate(turns) if message["role"] == "user"]
    if len(begins) == 1:
        return [row]
    middle = begins[len(begins) // 2]
    parts = [system + turns[:middle], system + turns[middle:]]
    checks = ("", row.check)  # which is of the last answer
    return [Row(part, row.tools, None, row.group, row.slice, check) for part, check in zip(parts, checks, strict=True)]


_worker: Worker | None = None


def start(job: ReadJob) -> None:
    """Make this process a worker, which ends when its parent does and leaves Ctrl-C to it."""
    global _worker
    import gc
    import signal
    import threading
    from multiprocessing import connection, parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores
    _worker = Worker(job)
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)  # a block's rows are no cycles: looking for some takes a tenth of the time


def read_block(block: Block, shape: str, side: Side) -> BlockResult:
    """Read a block in this worker process."""
    if _worker is None:
        raise RuntimeError("start was not called")
    return _worker.read(block, shape_named(shape), side)
