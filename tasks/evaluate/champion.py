"""The champion's package: found, and verified before anything is compared with it."""

from pathlib import Path

from tasks.errors import ForgeError
from tasks.package import open_package
from tasks.registry import Champion
from tasks.settings import Settings
from tasks.storage import Store

MEND = "put it back, or take the alias champion from the version in MLflow, to start without one"


def find_package(name: str, champion: Champion, store: Store) -> str:
    """The digest of the champion's package; ForgeError where it is not there."""
    try:
        manifest = store.manifest(champion.uri)
    except ForgeError as error:
        raise _told(name, champion, error) from None
    return champion.digest or str(manifest["digest"])


def champion_package(name: str, champion: Champion, store: Store, settings: Settings) -> tuple[Path, str]:
    """Where the champion's package is, verified file by file, and the digest of the model in it."""
    digest = find_package(name, champion, store)
    try:
        package, manifest = open_package(champion.uri, digest, settings, store)
    except ForgeError as error:
        raise _told(name, champion, error) from None
    return package, str(manifest.get("model_digest", digest))


def _told(name: str, champion: Champion, error: ForgeError) -> ForgeError:
    reason, _, _ = error.message.partition("; ")
    return ForgeError(f"champion {name} version {champion.version}: {reason}; {MEND}")
