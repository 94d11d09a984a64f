"""The stage's work: from a source of raw rows to a data set in the store."""

import hashlib
import json
import logging
import os
import resource
import shutil
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
from forge.registry.packages import LocalBase, local_base
from forge.storage import Store
from forge.storage.completed import find_completed, record_completed
from tasks.preprocess.chat import ChatFormat, chat_format, load_tokenizer
from tasks.preprocess.dataset_report import render_dataset_report
from tasks.preprocess.pack import write_packed
from tasks.preprocess.read import REJECTS, SourcePart, check_slices, read_part, start_workers_early
from tasks.preprocess.rows import ROLES
from tasks.preprocess.select import Selection, select
from tasks.preprocess.sources import digest_source

log = logging.getLogger(__name__)

CARD = "dataset.json"
REPORT = "report.html"
STAGE = "preprocess"
SHOWN = 10  # refused rows printed; all are in rejects.jsonl


def prepare(source: Source, data: DataRecipe, base: Base, store: Store, settings: Settings) -> Dataset:
    """Validate, deduplicate, split, tokenise and pack the source's rows, and publish the data set.

    The data set is a directory: `train/` and `heldout/` (packed arrays), `heldout.jsonl` (the held-out rows),
    `tokenizer/`, the card `dataset.json`, `report.html` and `rejects.jsonl` (the rows that were refused, and why). Its
    digest depends on the rows, not on their order or the names of their files. One that was published before from the
    same rows, recipe and base, is found and not made again.

    Raises Problems naming the rows that cannot be used where they are more than the recipe allows.
    """
    if dataset := find_prepared(source, data, base, store):
        return dataset
    started = time.time()
    local = local_base(base, settings, store)
    with store.stage() as directory:
        part = _read(source, data, local, directory)
        return assemble([part], source, data, base, local, store, started)


def find_prepared(source: Source, data: DataRecipe, base: Base, store: Store) -> Dataset | None:
    """The data set that was published from the same; what its shards have left is removed."""
    asked = _asked(source, data, base)
    dataset = find_completed(store, STAGE, asked, Dataset)
    if dataset is not None and data.shards > 1:
        for shard in range(data.shards):
            if left := find_completed(store, STAGE, [*asked, shard], Artifact):
                store.remove(left.uri)
    return dataset


def _asked(source: Source, data: DataRecipe, base: Base) -> list[Any]:
    """What decides the data set."""
    return [source.digest, data.model_dump(mode="json"), base.model_dump()]


def prepare_shard(
    source: Source, data: DataRecipe, base: Base, store: Store, settings: Settings, shard: int
) -> Artifact:
    """Read one of the recipe's shards of the source, and publish what it came to for `prepare_from_shards`."""
    asked = [*_asked(source, data, base), shard]
    if found := find_completed(store, STAGE, asked, Artifact):
        return found
    started = time.time()
    local = local_base(base, settings, store)
    with store.stage() as directory:
        _read(source, data, local, directory, shard).save()
        for copied in directory.glob("copied-*"):
            shutil.rmtree(copied)
        digest, _ = digest_directory(directory)
        uri = store.publish(directory, "parts", digest)
        part = Artifact(uri=uri, digest=digest, store=store.identity, started=started, seconds=time.time() - started)
        record_completed(store, STAGE, asked, part)
    return part


def prepare_from_shards(
    shards: list[Artifact], source: Source, data: DataRecipe, base: Base, store: Store, settings: Settings
) -> Dataset:
    """The data set of all shards: the same, to the byte, as `prepare` makes of the whole source. Removes the shards."""
    if dataset := find_prepared(source, data, base, store):
        return dataset
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each shard has a file for each process that read it
    parts = [SourcePart.load(store.path(shard.uri)) for shard in shards]
    local = local_base(base, settings, store)
    dataset = assemble(parts, source, data, base, local, store, min(shard.started for shard in shards))
    for shard in shards:
        store.remove(shard.uri)
    return dataset


def _read(source: Source, data: DataRecipe, base: LocalBase, directory: Path, shard: int = 0) -> SourcePart:
    data = data.model_copy(update={"source": source.uri, "heldout_source": source.heldout})
    start_workers_early(data)
    part = read_part(data, _format(base, data), _name(base), directory, shard, data.shards)
    if digest_source(data) != source.digest:
        raise ForgeError(f"data {source.uri}: the rows were changed while they were read; run again")
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
    """Choose, pack and publish what was read, and record it."""
    part = _merged(parts, data)
    _check_rejected(parts, part, data, source, store)
    chosen = select(part, data.near_duplicates)
    _check_sides(chosen, data, source, part)
    tokenizer = load_tokenizer(local, data.max_seq_len)
    spills = [part.directory / f"{name}.tokens" for name in part.spills]
    with store.stage() as staged:
        sides = {"train": chosen.train, "heldout": chosen.heldout}
        packed = {
            name: write_packed(documents, spills, data.max_seq_len, staged / name) for name, documents in sides.items()
        }
        _write_rows(chosen.heldout, part, staged / "heldout.jsonl")
        tokenizer.save_pretrained(staged / "tokenizer")
        files = digest_directory(staged)[1]
        facts = _facts(part, chosen, packed, data, chat_format(tokenizer, _name(local)))
        digest = digest_json([files, facts])
        read_from = {"uri": source.uri, "heldout": source.heldout, "digest": source.digest, "shapes": part.shapes}
        card = {"kind": "dataset", "digest": digest, "source": read_from, **facts}
        (staged / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        with (staged / REJECTS).open("wb") as all_rejects:
            for one in parts:
                all_rejects.write((one.directory / REJECTS).read_bytes())
        page = render_dataset_report(card, staged, tokenizer)
        (staged / REPORT).write_text(page, encoding="utf-8")
        uri = store.publish(staged, "datasets", digest)
    dataset = Dataset(
        uri=uri,
        digest=digest,
        store=store.identity,
        started=started,
        seconds=time.time() - started,
        train_rows=len(chosen.train),
        heldout_rows=len(chosen.heldout),
        report=f"{uri}/{REPORT}",
    )
    record_completed(store, STAGE, _asked(source, data, base), dataset)
    for line in dataset_messages(card):
        log.info(line)
    return dataset


def _format(base: LocalBase, data: DataRecipe) -> ChatFormat:
    return chat_format(load_tokenizer(base, data.max_seq_len), _name(base))


def _name(base: LocalBase) -> str:
    return f"base model {base.location}" if base.location else "the byte-level tokenizer"


def _merged(parts: list[SourcePart], data: DataRecipe) -> SourcePart:
    """Several parts' documents in one table; the files stay where they are."""
    if len(parts) == 1:
        return parts[0]
    slices = sorted({name for part in parts for name in part.slices})
    check_slices(slices, data)
    tables: list[np.ndarray] = []
    spills: list[str] = []
    rejected: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
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
    return SourcePart(
        parts[0].directory,
        np.concatenate(tables),
        slices,
        spills,
        parts[0].shapes,
        sum(part.rows for part in parts),
        dict(sorted(rejected.items())),
        dict(sorted(ignored.items())),
    )


def _check_rejected(parts: list[SourcePart], part: SourcePart, data: DataRecipe, source: Source, store: Store) -> None:
    """Raise Problems where more rows were refused than the recipe allows; they are all kept in the store."""
    count = sum(part.rejected.values())
    if count <= data.max_reject_fraction * part.rows:
        return
    shown: list[str] = []
    with store.stage() as staged:
        with (staged / REJECTS).open("w", encoding="utf-8") as all_rejects:
            for one in parts:
                with (one.directory / REJECTS).open(encoding="utf-8") as rejects:
                    for line in rejects:
                        all_rejects.write(line)
                        if len(shown) < SHOWN:
                            refused = json.loads(line)
                            shown.append(f"{refused['row']}: {refused['message']}")
        kept = f"{store.publish(staged, 'rejects')}/{REJECTS}"
    by_reason = ", ".join(f"{times} {reason}" for reason, times in _largest_first(part.rejected))
    more = [f"... and {count - len(shown)} more, all in {kept}"] if count > len(shown) else []
    raise Problems(
        f"data {source.uri}: {count} of {part.rows} rows cannot be used ({by_reason}), and data.max_reject_fraction is "
        f"{data.max_reject_fraction:g}:",
        [*shown, *more],
    )


def _check_sides(chosen: Selection, data: DataRecipe, source: Source, part: SourcePart) -> None:
    train, heldout = len(chosen.train), len(chosen.heldout)
    if train and heldout:
        return
    left_out = "".join(f", {count} left out ({reason})" for reason, count in chosen.removed.items())
    mend = "data.heldout_source" if data.heldout_source else "data.heldout_fraction"
    raise ForgeError(
        f"data {source.uri}: {part.rows} rows give {train} to train on and {heldout} held out{left_out}, and neither "
        f"may be empty; give more rows, or change {mend}"
    )


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


def _facts(
    part: SourcePart, chosen: Selection, packed: dict[str, int], data: DataRecipe, form: ChatFormat
) -> dict[str, Any]:
    """What the card says of the data set, and its digest depends on: nothing of where the rows came from."""
    sides = {"train": chosen.train, "heldout": chosen.heldout}
    tokens = {name: int(side["length"].sum(dtype=np.int64)) for name, side in sides.items()}
    return {
        "context": data.max_seq_len,
        "rows": part.rows,
        "rejected": part.rejected,
        "removed": chosen.removed,
        "ignored_columns": part.ignored,
        "documents": {name: len(side) for name, side in sides.items()},
        "tokens": tokens,
        "tokens_dropped": int(sum(side["cut"].sum(dtype=np.int64) for side in sides.values())),
        "documents_cut": int(sum(np.count_nonzero(side["cut"]) for side in sides.values())),
        "trained_tokens": {name: int(side["trained"].sum(dtype=np.int64)) for name, side in sides.items()},
        "packed_rows": packed,
        "packing_efficiency": {name: round(tokens[name] / (packed[name] * data.max_seq_len), 5) for name in sides},
        "lengths": {name: _histogram(side["length"], data.max_seq_len) for name, side in sides.items()},
        "roles": {
            role: int(sum(side["roles"][:, at].sum() for side in sides.values())) for at, role in enumerate(ROLES)
        },
        "slices": {
            name: dict(_largest_first(_counted(side["slice"], part.slices))) for name, side in sides.items()
        },
        "split": _split(data),
        "template_digest": hashlib.sha256(form.template.encode()).hexdigest(),
        "tokenizer_digest": hashlib.sha256(form.tokenizer.encode()).hexdigest(),
    }  # fmt: skip


def _split(data: DataRecipe) -> dict[str, Any]:
    if data.heldout_source:
        return {"by": "a file of its own"}
    by = f"hash of {data.group_column}, or of the first question"
    return {"by": by, "heldout_fraction": data.heldout_fraction}


def _counted(numbers: np.ndarray, names: list[str]) -> dict[str, int]:
    counts = np.bincount(numbers, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _largest_first(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def _histogram(lengths: np.ndarray, context: int) -> list[dict[str, int]]:
    """Documents and tokens by length, in bins that double: `to` is the longest in the bin."""
    edges = [min(16 << bin, context) for bin in range(32) if bin == 0 or 16 << (bin - 1) < context]
    bins = np.searchsorted(edges, lengths)
    documents = np.bincount(bins, minlength=len(edges))
    tokens = np.bincount(bins, weights=lengths, minlength=len(edges))
    table = zip(edges, documents.tolist(), tokens.tolist(), strict=True)
    return [{"to": to, "documents": count, "tokens": int(inside)} for to, count, inside in table]


def dataset_messages(card: dict[str, Any]) -> list[str]:
    """What the user reads at the end: all that was used and all that was not."""
    documents, efficiency = card["documents"], card["packing_efficiency"]
    lines = [f"shape {shape}" for shape in card["source"]["shapes"]]
    for what in ("rejected", "removed"):
        if card[what]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in _largest_first(card[what]))
            lines.append(f"{sum(card[what].values()):,} {what}: {reasons}")
    if card["documents_cut"]:
        lines.append(f"{card['documents_cut']:,} cut at the context: {card['tokens_dropped']:,} tokens dropped")
    if card["ignored_columns"]:
        lines.append(f"columns not used: {', '.join(card['ignored_columns'])}")
    lines.append(
        f"{documents['train']:,} documents to train on, {documents['heldout']:,} held out, packed into "
        f"{card['packed_rows']['train']:,} rows of {card['context']} tokens ({efficiency['train']:.1%} full)"
    )
    return lines
