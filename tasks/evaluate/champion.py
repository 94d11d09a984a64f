"""The champion's package: found, and verified before anything is compared with it."""

import json
from pathlib import Path

from tasks.errors import ForgeError
from tasks.registry import Champion
from tasks.storage import DirectoryStore
from tasks.storage.package import MANIFEST, verify_package

MEND = "put it back, or take the alias champion from the version in MLflow, to start without one"


def find_package(name: str, champion: Champion, store: DirectoryStore) -> tuple[Path, str]:
    """Where the champion's package is, and its digest; ForgeError where it is not there."""
    what = f"champion {name} version {champion.version}"
    try:
        package = store.path(champion.uri)
    except ForgeError:
        raise ForgeError(f"{what}: its package {champion.uri} is gone; {MEND}") from None
    try:
        return package, champion.digest or json.loads((package / MANIFEST).read_text())["digest"]
    except (OSError, ValueError, KeyError):
        raise ForgeError(f"{what}: {package / MANIFEST} is missing or broken; {MEND}") from None


def champion_package(name: str, champion: Champion, store: DirectoryStore) -> tuple[Path, str]:
    """The same, verified file by file."""
    package, digest = find_package(name, champion, store)
    try:
        verify_package(package, digest)
    except ForgeError as error:
        reason = error.message.removesuffix("; delete the package and run again")
        raise ForgeError(f"champion {name} version {champion.version}: {reason}; {MEND}") from None
    return package, digest
