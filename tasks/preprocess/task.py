"""The doors of preprocessing: of the whole, and of what it is made of where a source is read in shards."""

from functools import partial
from pathlib import Path
from typing import Annotated

from flytekit import Cache, Deck, HashMethod, dynamic, map_task, task

from tasks.contracts import Artifact, Base, Dataset, Source, cache_key
from tasks.package import local_base
from tasks.pods import light
from tasks.recipe import DataRecipe
from tasks.settings import load_settings
from tasks.storage import Store, open_store
from tasks.version import code_version

READER = light(cores=16, memory=64, hours=6)


@task(enable_deck=True, **READER)
def prepare_whole(source: Source, data: DataRecipe, base: Base) -> Annotated[Dataset, HashMethod(cache_key)]:
    """Raw rows to a packed data set, by this machine alone."""
    from tasks.preprocess.prepare import prepare

    dataset = prepare(source, data, *opened(base))
    show(dataset)
    return dataset


@task(**READER)
def read_shard(shard: int, source: Source, data: DataRecipe, base: Base) -> Artifact:
    """One shard of the raw rows, checked and tokenised."""
    from tasks.preprocess.prepare import prepare_shard

    return prepare_shard(source, data, *opened(base), shard)


@task(enable_deck=True, **READER)
def pack_shards(
    shards: list[Artifact], source: Source, data: DataRecipe, base: Base
) -> Annotated[Dataset, HashMethod(cache_key)]:
    """All shards to the data set that `prepare_whole` would make."""
    from tasks.preprocess.prepare import prepare_from_shards

    dataset = prepare_from_shards(shards, source, data, *opened(base))
    show(dataset)
    return dataset


@dynamic(cache=Cache(version=code_version("preprocess"), serialize=True), **light(hours=8))
def preprocess_data(source: Source, data: DataRecipe, base: Base) -> Annotated[Dataset, HashMethod(cache_key)]:
    """Raw rows to a packed data set in the store; in shards side by side, where the recipe asks for more than one."""
    if data.shards == 1:
        return prepare_whole(source=source, data=data, base=base)
    shards = map_task(partial(read_shard, source=source, data=data, base=base))(shard=list(range(data.shards)))
    return pack_shards(shards=shards, source=source, data=data, base=base)


def opened(base: Base) -> tuple[Base, Store]:
    """The base model as this machine can open it, and the store."""
    settings = load_settings()
    store = open_store(settings)
    return local_base(base, settings, store), store


def show(dataset: Dataset) -> None:
    """Make the report the task's deck."""
    Deck("Data", Path(dataset.report).read_text(encoding="utf-8"))
