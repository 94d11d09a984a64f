"""The data set that Forge trains on, and its documents one by one for the others, who pack or pad by themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100
ORDER_SEED = 20


def prepare_dataset(rows: Path, base: Path, context: int, store: Path) -> Path:
    """Have Forge prepare the rows; the directory of the data set."""
    from forge.core.contracts import Base, Source
    from forge.core.recipe import DataRecipe
    from forge.core.settings import load_settings
    from forge.storage import DirectoryStore
    from tasks.preprocess.prepare import prepare
    from tasks.preprocess.sources import digest_source

    # Conversations with one exchange longer than the context are left out, for every side alike.
    recipe = DataRecipe(
        source=str(rows), max_seq_len=context, heldout_fraction=0.1, overlong="split", max_reject_fraction=0.2
    )
    opened = DirectoryStore(store)
    source = Source(uri=rows.absolute().as_uri(), digest=digest_source(recipe), store=opened.identity)
    dataset = prepare(source, recipe, Base(location=base.absolute().as_uri()), opened, load_settings())
    return opened.path(dataset.uri)


def documents(directory: Path) -> dict[str, list[list[int]]]:
    """The documents of one split of a data set (train/ or heldout/), as columns of token ids and labels.

    They are shuffled: packed rows lie side by side with documents that fill them up, which would help who packs again.
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
    """What `prepare` says of a data set: documents, tokens and packed rows of each split."""
    found: dict[str, Any] = json.loads((dataset / "dataset.json").read_text())
    return found
