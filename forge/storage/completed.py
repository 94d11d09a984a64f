"""What stages have done, by what they were asked to do: one that is tried again after that finds its result.

A record is written as soon as the artifact is published, before checkpoints or shards are removed. Flyte's own cache
knows a result only once the task has ended.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from forge.core.code_version import code_version
from forge.core.contracts import Artifact
from forge.core.digest import digest_json

if TYPE_CHECKING:
    from forge.storage import Store

Found = TypeVar("Found", bound=Artifact)


def find_completed(store: "Store", stage: str, asked: Sequence[Any], kind: type[Found]) -> Found | None:
    """What a stage has come to, `asked` being all that decides its result; None where its artifact is gone, too."""
    data = store.read(_place(stage, asked))
    if data is None:
        return None
    try:
        result = kind.model_validate_json(data)
    except ValidationError:  # of another release
        return None
    root = store.uri("").rstrip("/") + "/"
    here = result.store == store.identity and result.uri.startswith(root)
    return result if here and store.exists(result.uri.removeprefix(root)) else None


def record_completed(store: "Store", stage: str, asked: Sequence[Any], result: Artifact) -> None:
    """Record what a stage has come to, for `find_done`."""
    store.put(_place(stage, asked), result.model_dump_json().encode())


def _place(stage: str, asked: Sequence[Any]) -> str:
    return f"done/{stage}/{digest_json([code_version('tasks.' + stage), *asked])}.json"
