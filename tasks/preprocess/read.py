"""Read all rows of a source, or one shard of them, with as many processes as there are cores."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import forkserver
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.models.chat_format import ChatFormat
from forge.models.conversation import Renderer
from forge.storage.remote_files import is_remote
from tasks.preprocess import worker
from tasks.preprocess.file_formats import BLOCK, Block
from tasks.preprocess.row_formats import RowFormat, find_row_format, mixed_row_formats
from tasks.preprocess.sources import DEMONSTRATION, blocks_of, find_files
from tasks.preprocess.worker import DOCUMENT, BlockResult, ReadJob, Side, Worker

POOL_FROM = 6  # blocks; one process reads fewer than that sooner than a pool could start
READ_ALONE = 1  # blocks that this process reads while the pool starts
MAX_SLICES = 1000
REJECTS = "rejects.jsonl"
CARD = "part.json"


@dataclass
class SourcePart:
    """What was read of a source, or of a shard of it: a table of documents, and the files that it points into."""

    directory: Path
    documents: np.ndarray
    slices: list[str]
    spills: list[str]
    shapes: list[str]  # of each source: the row format and how it was found
    rows: int
    rejected: dict[str, int]
    ignored: dict[str, int]
    turns: dict[str, int]  # messages that are changed, dropped or not trained, by reason
    ends: dict[str, int]  # control tokens that end trained turns, and in how many documents

    def save(self) -> None:
        """Write the table and the card into the directory, next to the files."""
        np.save(self.directory / "documents.npy", self.documents)
        card = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("directory", "documents")
        }
        text = json.dumps({"kind": "part", **card}, indent=2) + "\n"
        (self.directory / CARD).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "SourcePart":
        """Load what `save` wrote."""
        card = json.loads((directory / CARD).read_text(encoding="utf-8"))
        del card["kind"]
        return cls(directory, np.load(directory / "documents.npy"), **card)


def start_workers_early(recipe: DataRecipe) -> None:
    """Start the server that workers are forked from, if the source is large enough to need them.

    It imports everything that workers need while this process does other things. Forking from it is safe whatever
    threads this process has.
    """
    local = [source for source, _ in sources(recipe) if source != DEMONSTRATION and not is_remote(source)]
    if any(file.path.stat().st_size > POOL_FROM * BLOCK for source in local for file in find_files(source)):
        multiprocessing.get_context("forkserver").set_forkserver_preload([worker.__name__])
        forkserver.ensure_running()


def read_part(
    recipe: DataRecipe, form: ChatFormat, where: str, directory: Path, shard: int = 0, shards: int = 1
) -> SourcePart:
    """Read the recipe's rows (of `shards` shards, the one numbered `shard`) into a directory.

    `where` names the base model in messages. Rejected rows go to rejects.jsonl there.

    Raises ForgeError if a file cannot be read, rows have different formats, or the chat template cannot be used.
    """
    job = ReadJob(recipe, form, where, directory)
    columns = [SpinnerColumn(), TextColumn("read and tokenise {task.fields[rows]:,} rows"), TimeElapsedColumn()]
    with (directory / REJECTS).open("w", encoding="utf-8") as rejects, Progress(*columns) as progress:
        collector = _Collector(job, rejects)
        bar = progress.add_task("read", total=None, rows=0)
        for source, side in sources(recipe):
            blocks, row_format, reason = find_row_format(
                recipe, blocks_of(recipe, source, directory / f"copied-{side}")
            )
            if row_format.name != "text":
                Renderer(form, where).probe()
            collector.shapes.append(f"{row_format.name}: {reason}")
            mine = (block for block in blocks if block.order % shards == shard)
            for result in _read_all(job, mine, row_format, side):
                collector.add(result, reason)
                progress.update(bar, rows=collector.rows)
    return collector.part()


class _Collector:
    """Merges the results of blocks, in order, into a part."""

    def __init__(self, job: ReadJob, rejects: TextIO) -> None:
        self.job, self.rejects = job, rejects
        self.shapes: list[str] = []
        self.rows = 0
        self._tables: list[np.ndarray] = []
        self._spills: list[str] = []
        self._slices: dict[str, int] = {}
        self._rejected: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._turns: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()

    def add(self, result: BlockResult, reason: str) -> None:
        """Add a block's result; `reason` says which row format its source has."""
        if result.other_shape:
            number, other = result.other_shape
            raise mixed_row_formats(f"{result.block.name}:{number}", other, reason)
        self.rows += result.rows
        for number, name, message in result.rejected:
            self._rejected[name] += 1
            row = {"row": f"{result.block.name}:{number}", "reason": name, "message": message}
            self.rejects.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._ignored.update(result.ignored)
        self._turns.update(result.turns)
        self._ends.update(result.ends)
        self._tables.append(self._renumbered(result))

    def _renumbered(self, result: BlockResult) -> np.ndarray:
        """A block's documents, with the part's numbers of spills and slices."""
        if result.spill not in self._spills:
            self._spills.append(result.spill)
        numbers = [self._slices.setdefault(name, len(self._slices)) for name in result.slices]
        check_slices(self._slices, self.job.recipe)
        documents = result.documents
        documents["spill"] = self._spills.index(result.spill)
        if len(documents):
            documents["slice"] = np.array(numbers, dtype=np.uint16)[documents["slice"]]
        return documents

    def part(self) -> SourcePart:
        """Everything that was added."""
        return SourcePart(
            self.job.directory,
            np.concatenate(self._tables) if self._tables else np.zeros(0, dtype=DOCUMENT),
            list(self._slices),
            self._spills,
            self.shapes,
            self.rows,
            dict(sorted(self._rejected.items())),
            dict(sorted(self._ignored.items())),
            dict(sorted(self._turns.items())),
            dict(sorted(self._ends.items())),
        )


def sources(recipe: DataRecipe) -> list[tuple[str, Side]]:
    """The sources to read, each with the side of the split that its rows belong to."""
    if not recipe.heldout_source:
        return [(recipe.source, "both")]
    return [(recipe.source, "train"), (recipe.heldout_source, "heldout")]


def check_slices(slices: Collection[str], recipe: DataRecipe) -> None:
    """Raise ForgeError if there are too many slices to report scores for."""
    if len(slices) > MAX_SLICES:
        raise ForgeError(
            f"the column {recipe.slice_column} has more than {MAX_SLICES} values, and scores are reported by slice",
            where="data",
            fix="name a column with fewer values in data.slice_column",
        )


def _read_all(job: ReadJob, blocks: Iterator[Block], row_format: RowFormat, side: Side) -> Iterator[BlockResult]:
    """The result of each block, in order. A few blocks are read by this process alone."""
    first = list(islice(blocks, POOL_FROM))
    alone = Worker(job)
    few = len(first) < POOL_FROM
    for block in first if few else first[:READ_ALONE]:
        yield alone.read(block, row_format, side)
    if not few:
        yield from _read_with_pool(job, chain(first[READ_ALONE:], blocks), row_format, side)


def _read_with_pool(job: ReadJob, blocks: Iterator[Block], row_format: RowFormat, side: Side) -> Iterator[BlockResult]:
    """The result of each block, in order, read by one worker process per core."""
    count = os.cpu_count() or 1
    context = multiprocessing.get_context("forkserver")
    waiting: deque[Future[BlockResult]] = deque()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, context, worker.start, (job,)) as pool:
        try:
            for block in blocks:
                try:
                    with _no_main():
                        waiting.append(pool.submit(worker.read_block, block, row_format.name, side))
                except OSError as error:  # the pool was starting a worker while another was killed: its pipes closed
                    raise BrokenProcessPool from error
                if len(waiting) > 2 * count:  # bounds the memory, and keeps every process busy
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            # The pool waits for workers that it was starting when another was killed, and does not stop them.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise ForgeError(
                "a worker process was killed, most likely because memory ran out",
                where="preprocess",
                fix="use a machine with more memory",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Keep processes that start meanwhile from importing this program's main module, which they do not need."""
    main = sys.modules["__main__"]
    kept = {name: value for name in ("__spec__", "__file__") if (value := getattr(main, name, None)) is not None}
    try:
        for name in kept:
            setattr(main, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)
