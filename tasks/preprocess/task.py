"""The door of preprocessing."""

from typing import Annotated

from flytekit import Cache, HashMethod, task

from tasks.contracts import Base, Dataset, Source, cache_key
from tasks.recipe import DataRecipe
from tasks.settings import load_settings
from tasks.storage import open_store
from tasks.version import code_version


@task(cache=Cache(version=code_version("preprocess"), serialize=True))
def preprocess_data(source: Source, data: DataRecipe, base: Base) -> Annotated[Dataset, HashMethod(cache_key)]:
    """Raw rows to a packed data set in the store."""
    from tasks.preprocess.prepare import prepare

    return prepare(source, data, base, open_store(load_settings()))
