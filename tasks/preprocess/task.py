"""The Flyte tasks of preprocessing: one for the whole stage, and those that it runs when a source is read in shards."""

from functools import partial
from typing import Annotated

from flytekit import Cache, Deck, HashMethod, dynamic, map_task, task

from forge.core.code_version import code_version
from forge.core.contracts import Artifact, Base, Dataset, Source, cache_key
from forge.core.logs import start_logging
from forge.core.recipe import DataRecipe
from forge.core.settings import Settings, load_settings
from forge.storage import Store, open_store
from tasks.task_pods import light

READER = light(cores=16, memory=64, hours=6)
DECK = {"enable_deck": True, "deck_fields": ()}  # only the report: Flyte's own decks need pip, which images lack


@task(**DECK, **READER)
def prepare_whole(source: Source, data: DataRecipe, base: Base) -> Annotated[Dataset, HashMethod(cache_key)]:
    """Raw rows to a packed data set, on this machine alone."""
    from tasks.preprocess.prepare import prepare

    start_logging("preprocess")
    dataset = prepare(source, data, base, *_store_and_settings())
    _show_report(dataset)
    return dataset


@task(**READER)
def read_shard(shard: int, source: Source, data: DataRecipe, base: Base) -> Artifact:
    """Check and tokenise one shard of the raw rows."""
    from tasks.preprocess.prepare import prepare_shard

    start_logging("preprocess")
    return prepare_shard(source, data, base, *_store_and_settings(), shard)


@task(**DECK, **READER)
def pack_shards(
    shards: list[Artifact], source: Source, data: DataRecipe, base: Base
) -> Annotated[Dataset, HashMethod(cache_key)]:
    """All shards to the same data set that `prepare_whole` would produce."""
    from tasks.preprocess.prepare import prepare_from_shards

    start_logging("preprocess")
    dataset = prepare_from_shards(shards, source, data, base, *_store_and_settings())
    _show_report(dataset)
    return dataset


@dynamic(cache=Cache(version=code_version("tasks.preprocess"), serialize=True), **light(hours=8))
def preprocess_data(source: Source, data: DataRecipe, base: Base) -> Annotated[Dataset, HashMethod(cache_key)]:
    """Raw rows to a packed data set in the store; in parallel shards if the recipe has more than one."""
    from tasks.preprocess.prepare import find_prepared

    start_logging("preprocess")
    # If an earlier attempt has packed the shards, they are deleted: read_shard would read them again.
    if data.shards == 1 or find_prepared(source, data, base, _store_and_settings()[0]):
        return prepare_whole(source=source, data=data, base=base)
    shards = map_task(partial(read_shard, source=source, data=data, base=base))(shard=list(range(data.shards)))
    return pack_shards(shards=shards, source=source, data=data, base=base)


def _store_and_settings() -> tuple[Store, Settings]:
    settings = load_settings()
    return open_store(settings), settings


def _show_report(dataset: Dataset) -> None:
    """Show the report as the task's deck."""
    store, _ = _store_and_settings()
    Deck("Data", store.path(dataset.report).read_text(encoding="utf-8"))
