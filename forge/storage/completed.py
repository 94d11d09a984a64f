"""The results of stages, recorded by their inputs: a stage that is retried finds its result instead of repeating it.

A stage records its result as soon as the artifact is published, before it removes checkpoints or shards. Flyte's cache
knows the result only when the task has ended.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from forge.core.code_version import code_version
from forge.core.contracts import Artifact
from forge.core.digest import digest_json
from forge.storage.records import parse_or_none

if TYPE_CHECKING:
    from forge.storage import Store

Result = TypeVar("Result", bound=Artifact)


def find_completed(store: "Store", stage: str, inputs: Sequence[Any], kind: type[Result]) -> Result | None:
    """The result of a stage for `inputs`, which must decide it; None if there is none or its artifact is gone."""
    result = parse_or_none(kind, store.read(_key(stage, inputs)))
    return result if result is not None and _is_stored(store, result) else None


def record_completed(store: "Store", stage: str, inputs: Sequence[Any], result: Artifact) -> None:
    """Record the result of a stage, for `find_completed`."""
    store.put(_key(stage, inputs), result.model_dump_json().encode())


def _is_stored(store: "Store", result: Artifact) -> bool:
    root = store.uri("").rstrip("/") + "/"
    ours = result.store == store.identity and result.uri.startswith(root)
    return ours and store.exists(result.uri.removeprefix(root))


def _key(stage: str, inputs: Sequence[Any]) -> str:
    return f"done/{stage}/{digest_json([code_version('tasks.' + stage), *inputs])}.json"
