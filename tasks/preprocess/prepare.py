"""The stage's work: from a source of raw rows to a data set in the store."""

import hashlib
import json
import time
from pathlib import Path

from tasks.contracts import Base, Dataset, Source
from tasks.errors import ForgeError
from tasks.preprocess.chat import Document, encode, load_tokenizer
from tasks.preprocess.pack import write_packed
from tasks.preprocess.rows import SHOWN, Row, count_slices, digest_source, read_rows, report
from tasks.recipe import DataRecipe
from tasks.storage import DirectoryStore, digest_directory, digest_json

CARD = "dataset.json"


def prepare(source: Source, data: DataRecipe, base: Base, store: DirectoryStore) -> Dataset:
    """Validate, split, tokenise and pack the source's rows, and publish the data set.

    The data set is a directory: `train/` and `heldout/` (packed arrays), `heldout.jsonl` (the held-out
    conversations), `tokenizer/`, and the card `dataset.json`. Its digest depends on the rows, not on their order.

    Raises Problems naming the file and the line of each row that cannot be used.
    """
    started = time.time()
    data = data.model_copy(update={"source": source.uri})
    rows = sorted(read_rows(data), key=_row_digest)
    if digest_source(data) != source.digest:
        raise ForgeError(f"data {source.uri}: the rows were changed while they were read; run again")
    train, heldout = split(rows, data.heldout_fraction)
    if not train or not heldout:
        raise ForgeError(
            f"data {source.uri}: {len(rows)} rows give {len(train)} to train on and {len(heldout)} held out, and "
            "neither may be empty; give more rows, or change data.heldout_fraction"
        )
    tokenizer = load_tokenizer(base, data.context)
    documents = {"train": list(encode(train, tokenizer)), "heldout": list(encode(heldout, tokenizer))}
    check_lengths([*documents["train"], *documents["heldout"]], data.context)
    with store.stage() as staged:
        packed = {name: write_packed(part, data.context, staged / name) for name, part in documents.items()}
        write_conversations(heldout, staged / "heldout.jsonl")
        tokenizer.save_pretrained(staged / "tokenizer")
        digest, _ = digest_directory(staged)
        card = {
            "kind": "dataset",
            "digest": digest,
            "source": {"uri": source.uri, "digest": source.digest},
            "context": data.context,
            "documents": {name: len(part) for name, part in documents.items()},
            "packed_rows": {name: rows for name, (rows, _) in packed.items()},
            "packing_efficiency": {name: round(full, 5) for name, (_, full) in packed.items()},
            "trained_tokens": {name: int(sum(d.trained.sum() for d in part)) for name, part in documents.items()},
            "slices": {"train": count_slices(train), "heldout": count_slices(heldout)},
        }
        (staged / CARD).write_text(json.dumps(card, indent=2) + "\n")
        uri = store.publish(staged, "datasets")
    efficiency = card["packing_efficiency"]
    print(
        f"preprocess: {len(train):,} conversations to train on, {len(heldout):,} held out, packed into "
        f"{packed['train'][0]:,} rows of {data.context} tokens ({efficiency['train']:.1%} full)"  # type: ignore[index]
    )
    return Dataset(
        uri=uri,
        digest=digest,
        store=store.identity,
        started=started,
        seconds=time.time() - started,
        train_rows=len(train),
        heldout_rows=len(heldout),
    )


def split(rows: list[Row], heldout_fraction: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, by a hash of the group: a group never crosses, and adding rows moves none."""
    threshold = int(heldout_fraction * 2**64)
    train: list[Row] = []
    heldout: list[Row] = []
    for row in rows:
        number = int.from_bytes(hashlib.sha256(row.group.encode()).digest()[:8], "big")
        (heldout if number < threshold else train).append(row)
    return train, heldout


def check_lengths(documents: list[Document], context: int) -> None:
    """Raise Problems if a document is longer than a packed row."""
    too_long = [document for document in documents if len(document.tokens) > context]
    refused = [
        f"{document.row.where}: {len(document.tokens)} tokens, and data.context is {context}; "
        "shorten the row, or raise data.context"
        for document in sorted(too_long, key=lambda document: document.row.where)[:SHOWN]
    ]
    report(refused, len(too_long), f"{len(too_long)} of {len(documents)} rows")


def write_conversations(rows: list[Row], path: Path) -> None:
    """Write rows as JSONL of messages, group and slice."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            value = {"messages": row.messages, "group": row.group, "slice": row.slice}
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _row_digest(row: Row) -> str:
    return digest_json([row.messages, row.group, row.slice])
