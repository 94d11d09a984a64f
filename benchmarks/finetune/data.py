"""The data set that Forge trains on, and its separate documents for the other sides, which pack or pad themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100
ORDER_SEED = 20


def prepare_dataset(rows: Path, base: Path, context: int, store: Path) -> Path:
    """Prepare the rows with Forge; returns the directory of the data set."""
    from forge.core.contracts import Base, Source
    from forge.core.recipe import DataRecipe
    from forge.core.settings import load_settings
    from forge.storage import DirectoryStore
    from tasks.preprocess.prepare import prepare
    from tasks.preprocess.sources import digest_source

    # Rejects conversations with a single exchange longer than the context, for all sides.
    recipe = DataRecipe(
        source=str(rows), max_seq_len=context, heldout_fraction=0.1, overlong="split", max_reject_fraction=0.2
    )
    opened = DirectoryStore(store)
    source = Source(uri=rows.absolute().as_uri(), digest=digest_source(recipe), store=opened.identity)
    dataset = prepare(source, recipe, Base(location=base.absolute().as_uri()), opened, load_settings())
    return opened.path(dataset.uri)


def documents(directory: Path) -> dict[str, list[list[int]]]:
    """The documents of one side of the split (train/ or heldout/), as columns of token IDs and labels.

    They are shuffled: in the order of the packed rows, documents that fill a row together are adjacent, which would
    help a side that packs them again.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for shard in sorted(path for path in directory.iterdir() if path.is_dir()):
        tokens, trained, document = (np.load(shard / f"{name}.npy") for name in ("tokens", "trained", "document"))
        labels = np.where(trained, tokens.astype(np.int64), IGNORED)
        for row in range(len(tokens)):
            starts = np.flatnonzero(np.diff(document[row].astype(np.int64), prepend=0))
            for start, end in zip(starts, [*starts[1:], len(tokens[row])], strict=True):
                if document[row, start]:  # 0 is padding
                    columns["input_ids"].append(tokens[row, start:end].tolist())
                    columns["labels"].append(labels[row, start:end].tolist())
    order = np.random.default_rng(ORDER_SEED).permutation(len(columns["input_ids"]))
    return {name: [column[at] for at in order] for name, column in columns.items()}


def card(dataset: Path) -> dict[str, Any]:
    """The card of a data set: documents, tokens and packed rows of each side of the split."""
    content: dict[str, Any] = json.loads((dataset / "dataset.json").read_text())
    return content
