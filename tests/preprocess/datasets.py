"""Data sets for the tests."""

import json
from pathlib import Path

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
