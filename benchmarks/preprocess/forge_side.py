"""Forge's side: the whole of `prepare`. Run as `python -m benchmarks.preprocess.forge_side ARGUMENTS` (a JSON object).

Timed: starting workers, reading, validation, the search for secrets and duplicates, splitting, tokenising, packing and
publishing. Not timed: imports, and the digest of the source, which preflight computes.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.preprocess.timer import Timer
from forge.core.contracts import Base, Source
from forge.core.recipe import DataRecipe
from forge.core.settings import load_settings
from forge.storage import DirectoryStore
from tasks.preprocess.prepare import prepare
from tasks.preprocess.sources import digest_source


def main(rows: str, tokenizer: str, context: int, heldout_fraction: float, folder: str) -> dict[str, Any]:
    """Prepare the rows into a store in the folder; returns seconds and counts."""
    recipe = DataRecipe(source=rows, max_seq_len=context, heldout_fraction=heldout_fraction, overlong="split")
    store = DirectoryStore(Path(folder, "store"))
    source = Source(uri=Path(rows).absolute().as_uri(), digest=digest_source(recipe), store=store.identity)
    base = Base(location=Path(tokenizer).absolute().as_uri())
    timer = Timer()
    with timer:
        dataset = prepare(source, recipe, base, store, load_settings())
    card = json.loads((store.path(dataset.uri) / "dataset.json").read_text())
    if card["rejected"] or card["removed"]:
        raise SystemExit(f"Forge rejected or removed rows: {card['rejected']} {card['removed']}")
    return {
        "seconds": timer.seconds,
        "cpu_seconds": timer.cpu_seconds,
        "documents": sum(card["documents"].values()),
        "tokens": sum(card["tokens"].values()),
        "trained_tokens": sum(card["trained_tokens"].values()),
        "tokens_dropped": card["tokens_dropped"],
        "packed_rows": card["packed_rows"]["train"],
        "packing_efficiency": card["packing_efficiency"]["train"],
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["folder"], "result.json").write_text(json.dumps(main(**arguments)))
