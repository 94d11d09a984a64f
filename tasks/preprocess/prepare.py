"""Prepare a data set: from a source of raw rows to packed arrays in the store."""

import json
import logging
import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from forge.core.contracts import Artifact, Base, Dataset, Source
from forge.core.digest import digest_directory, digest_json
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import DataRecipe
from forge.core.settings import Settings
from forge.models.chat import load_tokenizer
from forge.models.chat_format import ChatFormat, chat_format
from forge.registry.packages import LocalBase, local_base
from forge.storage import Store
from forge.storage.completed import find_completed, record_completed
from tasks.preprocess.dataset_card import dataset_messages, dataset_statistics, largest_first
from tasks.preprocess.dataset_report import render_dataset_report
from tasks.preprocess.pack import write_packed
from tasks.preprocess.read import REJECTS, SourcePart, check_slices, read_part, start_workers_early
from tasks.preprocess.select import Selection, select
from tasks.preprocess.sources import digest_source

log = logging.getLogger(__name__)

CARD = "dataset.json"
REPORT = "report.html"
STAGE = "preprocess"
ROWS = "the rows that preprocessing has read"
MANY = 20  # documents by which a held-out side may be larger than the other
SHOWN = 10  # rejected rows printed; all are in rejects.jsonl


def prepare(source: Source, data: DataRecipe, base: Base, store: Store, settings: Settings) -> Dataset:
    """Validate, deduplicate, split, tokenise and pack the source's rows, and publish the data set.

    The data set is a directory: `train/` and `heldout/` (packed arrays), `heldout.jsonl` (the held-out rows),
    `tokenizer/`, the card `dataset.json`, `report.html` and `rejects.jsonl` (rejected rows with reasons). Its digest
    depends on the rows, not on their order or the names of their files. If a data set of the same rows, recipe and base
    was published before, it is returned.

    Raises Problems with the rejected rows if they are a larger share than the recipe allows.
    """
    if dataset := find_prepared(source, data, base, store):
        return dataset
    started = time.time()
    local = local_base(base, settings, store)
    with store.stage(ROWS) as directory:
        part = _read(source, data, local, directory)
        return assemble([part], source, data, base, local, store, started)


def find_prepared(source: Source, data: DataRecipe, base: Base, store: Store) -> Dataset | None:
    """The data set that was published for the same inputs, if any. Removes shards that were left over."""
    key = _key(source, data, base)
    dataset = find_completed(store, STAGE, key, Dataset)
    if dataset is not None and data.shards > 1:
        for shard in range(data.shards):
            if left := find_completed(store, STAGE, [*key, shard], Artifact):
                store.remove(left.uri)
    return dataset


def _key(source: Source, data: DataRecipe, base: Base) -> list[Any]:
    """Everything that the data set depends on."""
    return [source.digest, data.model_dump(mode="json"), base.model_dump()]


def prepare_shard(
    source: Source, data: DataRecipe, base: Base, store: Store, settings: Settings, shard: int
) -> Artifact:
    """Read one of the recipe's shards of the source, and publish its part for `prepare_from_shards`."""
    key = [*_key(source, data, base), shard]
    if published := find_completed(store, STAGE, key, Artifact):
        return published
    started = time.time()
    local = local_base(base, settings, store)
    with store.stage(ROWS) as directory:
        _read(source, data, local, directory, shard).save()
        for downloaded in directory.glob("copied-*"):
            shutil.rmtree(downloaded)
        digest, _ = digest_directory(directory)
        uri = store.publish(directory, "parts", digest)
        part = Artifact(uri=uri, digest=digest, store=store.identity, started=started, seconds=time.time() - started)
        record_completed(store, STAGE, key, part)
    return part


def prepare_from_shards(
    shards: list[Artifact], source: Source, data: DataRecipe, base: Base, store: Store, settings: Settings
) -> Dataset:
    """The data set of all shards: byte for byte what `prepare` makes of the whole source. Removes the shards."""
    if dataset := find_prepared(source, data, base, store):
        return dataset
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each shard has files of every process that read it
    parts = [SourcePart.load(store.path(shard.uri)) for shard in shards]
    local = local_base(base, settings, store)
    dataset = assemble(parts, source, data, base, local, store, min(shard.started for shard in shards))
    for shard in shards:
        store.remove(shard.uri)
    return dataset


def _read(source: Source, data: DataRecipe, base: LocalBase, directory: Path, shard: int = 0) -> SourcePart:
    data = data.model_copy(update={"source": source.uri, "heldout_source": source.heldout})
    try:
        start_workers_early(data)
        part = read_part(data, _format(base, data), _name(base), directory, shard, data.shards)
    except OSError as error:
        if "AF_UNIX path too long" not in str(error):
            raise
        raise ForgeError(
            "its name is too long for the sockets of worker processes",
            where=f"TMPDIR {tempfile.gettempdir()}",
            fix="set it to a directory with a shorter name",
        ) from None
    if digest_source(data) != source.digest:
        raise ForgeError("the rows changed while they were read", where=f"data {source.uri}", fix="run again")
    return part


def assemble(
    parts: list[SourcePart],
    source: Source,
    data: DataRecipe,
    base: Base,
    local: LocalBase,
    store: Store,
    started: float,
) -> Dataset:
    """Select, pack and publish the documents that were read, and record the data set."""
    part = _merge(parts, data)
    _check_rejected(parts, part, data, source, store)
    chosen = select(part, data.near_duplicates)
    _check_sides(chosen, data, source, part)
    with store.stage("the data set") as staged:
        card = _write_dataset(staged, parts, part, chosen, source, data, local)
        uri = store.publish(staged, "datasets", card["digest"])
    dataset = Dataset(
        uri=uri,
        digest=card["digest"],
        store=store.identity,
        started=started,
        seconds=time.time() - started,
        train_rows=len(chosen.train),
        heldout_rows=len(chosen.heldout),
        report=f"{uri}/{REPORT}",
    )
    record_completed(store, STAGE, _key(source, data, base), dataset)
    for line in dataset_messages(card):
        log.info(line)
    return dataset


def _write_dataset(
    directory: Path,
    parts: list[SourcePart],
    part: SourcePart,
    chosen: Selection,
    source: Source,
    data: DataRecipe,
    local: LocalBase,
) -> dict[str, Any]:
    """Write all files of the data set into a directory; returns its card."""
    tokenizer = load_tokenizer(local, data.max_seq_len)
    spills = [part.directory / f"{name}.tokens" for name in part.spills]
    sides = {"train": chosen.train, "heldout": chosen.heldout}
    packed = {
        name: write_packed(documents, spills, data.max_seq_len, directory / name) for name, documents in sides.items()
    }
    _write_rows(chosen.heldout, part, directory / "heldout.jsonl")
    tokenizer.save_pretrained(directory / "tokenizer")
    # The digest covers these files and the statistics, but not the source.
    _, files = digest_directory(directory)
    statistics = dataset_statistics(part, chosen, packed, data, chat_format(tokenizer, _name(local)))
    card = {
        "kind": "dataset",
        "digest": digest_json([files, statistics]),
        "source": {"uri": source.uri, "heldout": source.heldout, "digest": source.digest, "shapes": part.shapes},
        **statistics,
    }
    (directory / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    with (directory / REJECTS).open("wb") as rejects:
        for shard in parts:
            rejects.write((shard.directory / REJECTS).read_bytes())
    (directory / REPORT).write_text(render_dataset_report(card, directory, tokenizer), encoding="utf-8")
    return card


def _format(base: LocalBase, data: DataRecipe) -> ChatFormat:
    return chat_format(load_tokenizer(base, data.max_seq_len), _name(base))


def _name(base: LocalBase) -> str:
    return f"base model {base.location}" if base.location else "the byte-level tokenizer"


def _merge(parts: list[SourcePart], data: DataRecipe) -> SourcePart:
    """The documents of several parts in one table. The files stay where they are."""
    if len(parts) == 1:
        return parts[0]
    slices = sorted({name for part in parts for name in part.slices})
    check_slices(slices, data)
    tables: list[np.ndarray] = []
    spills: list[str] = []
    rejected: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    turns: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for part in parts:
        documents = part.documents
        documents["spill"] += len(spills)
        if len(documents):
            numbers = np.array([slices.index(name) for name in part.slices], dtype=np.uint16)
            documents["slice"] = numbers[documents["slice"]]
        spills += [str(part.directory / name) for name in part.spills]
        tables.append(documents)
        rejected.update(part.rejected)
        ignored.update(part.ignored)
        turns.update(part.turns)
        ends.update(part.ends)
    return SourcePart(
        parts[0].directory,
        np.concatenate(tables),
        slices,
        spills,
        parts[0].shapes,
        sum(part.rows for part in parts),
        dict(sorted(rejected.items())),
        dict(sorted(ignored.items())),
        dict(sorted(turns.items())),
        dict(sorted(ends.items())),
    )


def _check_rejected(parts: list[SourcePart], part: SourcePart, data: DataRecipe, source: Source, store: Store) -> None:
    """Raise Problems if more rows were rejected than the recipe allows. The list of all of them goes to the store."""
    count = sum(part.rejected.values())
    if count <= data.max_reject_fraction * part.rows:
        return
    shown: list[str] = []
    with store.stage("the list of rejected rows") as staged:
        with (staged / REJECTS).open("w", encoding="utf-8") as all_rejects:
            for shard in parts:
                with (shard.directory / REJECTS).open(encoding="utf-8") as rejects:
                    for line in rejects:
                        all_rejects.write(line)
                        if len(shown) < SHOWN:
                            rejected = json.loads(line)
                            shown.append(f"{rejected['row']}: {rejected['message']}")
        listed = f"{store.publish(staged, 'rejects')}/{REJECTS}"
    by_reason = ", ".join(f"{times} {reason}" for reason, times in largest_first(part.rejected))
    more = [f"... and {count - len(shown)} more, all in {listed}"] if count > len(shown) else []
    raise Problems(
        f"data {source.uri}: {count} of {part.rows} rows cannot be used ({by_reason}), and data.max_reject_fraction is "
        f"{data.max_reject_fraction:g}:",
        [*shown, *more],
    )


def _check_sides(chosen: Selection, data: DataRecipe, source: Source, part: SourcePart) -> None:
    """Raise ForgeError if nothing is left to train on, or nothing that can be evaluated is held out."""
    train, heldout = len(chosen.train), len(chosen.heldout)
    if train and heldout:
        if not chosen.heldout["scorable"].any():
            raise ForgeError(
                f"none of the {heldout} held-out documents has an answer that can be scored: all are plain texts, "
                "or end with a tool call, with reasoning or with an answer of weight 0",
                where=f"data {source.uri}",
                fix="name other rows in data.heldout_source",
            )
        if heldout > train + MANY and not data.heldout_source and data.heldout_fraction < 0.5:
            raise ForgeError(
                f"{heldout} of {train + heldout} documents would be held out, since {_grouping(data)}",
                where=f"data {source.uri}",
                fix="name a column that tells rows apart in data.group_column, or set data.heldout_source",
            )
        return
    removed = "".join(f", {count} removed ({reason})" for reason, count in chosen.removed.items())
    field = "data.heldout_source" if data.heldout_source else "data.heldout_fraction"
    why = "" if data.heldout_source else f" ({_grouping(data)})"
    raise ForgeError(
        f"{part.rows} rows give {train} training and {heldout} held-out documents{removed}; neither may be empty{why}",
        where=f"data {source.uri}",
        fix=f"add rows, or change {field}" + ("" if data.heldout_source else " or data.group_column"),
    )


def _grouping(data: DataRecipe) -> str:
    return f"rows with the same {data.group_column}, or without one the same first question, stay together"


def _write_rows(documents: np.ndarray, part: SourcePart, path: Path) -> None:
    """Write held-out rows as JSONL, in the order of the table."""
    files = [os.open(part.directory / f"{name}.rows", os.O_RDONLY) for name in part.spills]
    try:
        with path.open("wb") as out:
            for spill, at, size in documents[["spill", "rows_at", "rows_size"]].tolist():
                out.write(os.pread(files[spill], size, at))
    finally:
        for file in files:
            os.close(file)
