"""The champion's package: found, and verified before anything is compared with it."""

from pathlib import Path

from tasks.errors import ForgeError
from tasks.registry import Champion
from tasks.storage import Store
from tasks.storage.manifest import verify

MEND = "put it back, or take the alias champion from the version in MLflow, to start without one"


def find_package(name: str, champion: Champion, store: Store) -> str:
    """The digest of the champion's package; ForgeError where it is not there."""
    try:
        manifest = store.manifest(champion.uri)
    except ForgeError as error:
        raise _told(name, champion, error) from None
    return champion.digest or str(manifest["digest"])


def champion_package(name: str, champion: Champion, store: Store) -> tuple[Path, str]:
    """Where the champion's package is, and its digest, verified file by file."""
    digest = find_package(name, champion, store)
    try:
        package = store.path(champion.uri)
        verify(package, digest)
    except ForgeError as error:
        raise _told(name, champion, error) from None
    return package, digest


def _told(name: str, champion: Champion, error: ForgeError) -> ForgeError:
    reason, _, _ = error.message.partition("; ")
    return ForgeError(f"champion {name} version {champion.version}: {reason}; {MEND}")
