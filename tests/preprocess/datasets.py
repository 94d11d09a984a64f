"""Data sets for the tests."""

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from forge.core.contracts import Base, Dataset, Source
from forge.core.recipe import DataRecipe
from forge.core.settings import Settings
from forge.storage import DirectoryStore
from tasks.preprocess.prepare import prepare
from tasks.preprocess.sources import digest_source


def data_recipe(path: Path, **options: object) -> DataRecipe:
    """A recipe for a file or directory of short rows, half of them held out."""
    return DataRecipe.model_validate({"source": path.as_uri(), "max_seq_len": 128, "heldout_fraction": 0.5, **options})


def source_of(recipe: DataRecipe, store: DirectoryStore) -> Source:
    """The recipe's source as preflight hands it to preprocessing."""
    digest = digest_source(recipe)
    return Source(uri=recipe.source, heldout=recipe.heldout_source, digest=digest, store=store.identity)


def prepare_file(path: Path, store: DirectoryStore, base: Base | None = None, **options: object) -> Dataset:
    """Prepare a file or directory of rows as the pipeline does."""
    recipe = data_recipe(path, **options)
    return prepare(source_of(recipe, store), recipe, base or Base(), store, Settings())


def card_of(dataset: Dataset, store: DirectoryStore) -> dict:
    """The card of a data set."""
    return json.loads((store.path(dataset.uri) / "dataset.json").read_text())


def documents(dataset: Dataset, store: DirectoryStore) -> list[tuple[str, list[str]]]:
    """The text of each document of a data set, and the parts of it that are trained; sorted."""
    directory = store.path(dataset.uri)
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    found = []
    for shard in directory.glob("*/0*"):
        tokens, trained, document = (np.load(shard / f"{name}.npy") for name in ("tokens", "trained", "document"))
        for row, numbers in enumerate(document):
            for number in range(1, numbers.max() + 1):
                part = numbers == number
                marked = list(zip(tokens[row][part].tolist(), trained[row][part].tolist(), strict=True))
                runs = [[token for token, _ in run] for learned, run in groupby(marked, itemgetter(1)) if learned]
                found.append((tokenizer.decode(tokens[row][part]), [tokenizer.decode(run) for run in runs]))
    return sorted(found)
