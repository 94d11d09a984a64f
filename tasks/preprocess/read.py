"""All rows of a source, or one shard's share of them, read by as many processes as there are cores."""

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

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.storage.remote_files import is_remote
from tasks.preprocess import worker
from tasks.preprocess.chat import ChatFormat, Renderer
from tasks.preprocess.formats import BLOCK, Block
from tasks.preprocess.sample import two_shapes
from tasks.preprocess.shapes import RowFormat, find_row_format
from tasks.preprocess.sources import DEMONSTRATION, blocks_of, find_files
from tasks.preprocess.worker import DOCUMENT, BlockResult, ReadJob, Side, Worker

FEW = 6  # blocks that one process reads sooner than others could
ALONE = 1  # blocks that it reads anyway while the others start
MOST_SLICES = 1000
REJECTS = "rejects.jsonl"
CARD = "part.json"


@dataclass
class SourcePart:
    """What a source, or a shard of it, came to: a table of documents, and where the files are that it points into."""

    directory: Path
    documents: np.ndarray
    slices: list[str]
    spills: list[str]
    shapes: list[str]  # of each source: its name and the reason
    rows: int
    rejected: dict[str, int]
    ignored: dict[str, int]

    def save(self) -> None:
        """Write the table and the card into the directory, beside the files."""
        np.save(self.directory / "documents.npy", self.documents)
        card = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("directory", "documents")
        }
        (self.directory / CARD).write_text(json.dumps({"kind": "part", **card}, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "SourcePart":
        """What `save` wrote."""
        card = json.loads((directory / CARD).read_text())
        del card["kind"]
        return cls(directory, np.load(directory / "documents.npy"), **card)


def start_workers_early(recipe: DataRecipe) -> None:
    """Have the workers' imports made while this process does other things, if there will be workers.

    They are forked from a server that has imported it all, which is safe whatever threads this process has.
    """
    local = [source for source, _ in sources(recipe) if source != DEMONSTRATION and not is_remote(source)]
    if any(file.path.stat().st_size > FEW * BLOCK for source in local for file in find_files(source)):
        multiprocessing.get_context("forkserver").set_forkserver_preload([worker.__name__])
        forkserver.ensure_running()


def read_part(
    recipe: DataRecipe, form: ChatFormat, where: str, directory: Path, shard: int = 0, shards: int = 1
) -> SourcePart:
    """Read the recipe's rows (of `shards` shards, the one numbered `shard`) into a directory.

    `where` names the base model in messages. Refused rows go to rejects.jsonl there.

    Raises ForgeError where a file cannot be read, rows are of two shapes, or the chat template cannot be used.
    """
    part = SourcePart(directory, np.zeros(0, dtype=DOCUMENT), [], [], [], 0, {}, {})
    job = ReadJob(recipe, form, where, directory)
    tables: list[np.ndarray] = []
    slices: dict[str, int] = {}
    rejected: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    columns = [SpinnerColumn(), TextColumn("read and tokenise {task.fields[rows]:,} rows"), TimeElapsedColumn()]
    with (directory / REJECTS).open("w", encoding="utf-8") as rejects, Progress(*columns) as progress:
        bar = progress.add_task("read", total=None, rows=0)
        for source, side in sources(recipe):
            with_shape, shape, reason = find_row_format(recipe, blocks_of(recipe, source, directory / f"copied-{side}"))
            if shape.name != "text":
                Renderer(form, where).probe()
            part.shapes.append(f"{shape.name}: {reason}")
            mine = (block for block in with_shape if block.order % shards == shard)
            for found in _read_all(job, mine, shape, side):
                if found.other_shape:
                    number, other = found.other_shape
                    raise ForgeError(two_shapes(f"{found.block.name}:{number}", other, reason))
                part.rows += found.rows
                progress.update(bar, rows=part.rows)
                for number, reason_word, message in found.refused:
                    rejected[reason_word] += 1
                    row = {"row": f"{found.block.name}:{number}", "reason": reason_word, "message": message}
                    rejects.write(json.dumps(row, ensure_ascii=False) + "\n")
                ignored.update(found.ignored)
                tables.append(_globally(found, part.spills, slices, recipe))
    part.documents = np.concatenate(tables) if tables else part.documents
    part.slices = list(slices)
    part.rejected, part.ignored = dict(sorted(rejected.items())), dict(sorted(ignored.items()))
    return part


def sources(recipe: DataRecipe) -> list[tuple[str, Side]]:
    """Where rows are to be read from, and on which side of the split they come."""
    if not recipe.heldout_source:
        return [(recipe.source, "both")]
    return [(recipe.source, "train"), (recipe.heldout_source, "heldout")]


def _globally(found: BlockResult, spills: list[str], slices: dict[str, int], recipe: DataRecipe) -> np.ndarray:
    """A block's documents, with numbers of spills and slices that hold for the whole part."""
    if found.spill not in spills:
        spills.append(found.spill)
    numbers = [slices.setdefault(name, len(slices)) for name in found.slices]
    check_slices(slices, recipe)
    documents = found.documents
    documents["spill"] = spills.index(found.spill)
    if len(documents):
        documents["slice"] = np.array(numbers, dtype=np.uint16)[documents["slice"]]
    return documents


def check_slices(slices: Collection[str], recipe: DataRecipe) -> None:
    """Raise ForgeError if there are too many slices to give scores by."""
    if len(slices) > MOST_SLICES:
        raise ForgeError(
            f"data: the column {recipe.slice_column} has more than {MOST_SLICES} values; scores are given by slice, so "
            "name a column with few in data.slice_column"
        )


def _read_all(job: ReadJob, blocks: Iterator[Block], shape: RowFormat, side: Side) -> Iterator[BlockResult]:
    """What each block came to, in order; by this process if they are few."""
    first = list(islice(blocks, FEW))
    alone = Worker(job)
    for block in first if len(first) < FEW else first[:ALONE]:
        yield alone.read(block, shape, side)
    if len(first) < FEW:
        return
    count = os.cpu_count() or 1
    context = multiprocessing.get_context("forkserver")
    waiting: deque[Future[BlockResult]] = deque()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, context, worker.start, (job,)) as pool:
        try:
            for block in chain(first[ALONE:], blocks):
                try:
                    with _no_main():
                        waiting.append(pool.submit(worker.read_block, block, shape.name, side))
                except OSError as error:  # a worker is started by a pool whose pipes are closed, as another was killed
                    raise BrokenProcessPool from error
                if len(waiting) > 2 * count:  # bounds the memory, and keeps every process busy
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            # The pool does not end a worker that it was just starting when another was killed, and then waits for it.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise ForgeError(
                "preprocess: a worker process was killed, most likely for want of memory; give the machine more"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Processes that start meanwhile do not import the program that runs: they need nothing of it."""
    main = sys.modules["__main__"]
    kept = {name: value for name in ("__spec__", "__file__") if (value := getattr(main, name, None)) is not None}
    try:
        for name in kept:
            setattr(main, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)
