"""The champion's package: found, and verified before anything is compared with it."""

from pathlib import Path
from typing import Any

from tasks.contracts import Base
from tasks.errors import ForgeError
from tasks.package import ADAPTER, is_registered, local_base, open_package
from tasks.registry import Champion
from tasks.settings import Settings
from tasks.storage import Store, digest_directory
from tasks.storage.copies import Copies
from tasks.storage.manifest import MANIFEST, read_manifest, verify, write_manifest

MEND = "put it back, or take the alias champion from the version in MLflow, to start without one"


def find_package(name: str, champion: Champion, store: Store) -> str:
    """The digest of the champion's package; ForgeError where it, or the package that it stands on, is not there."""
    try:
        manifest = store.manifest(champion.uri)
        if manifest.get("kind") == ADAPTER and is_registered(manifest["base"]["location"]):
            store.manifest(manifest["base"]["location"])
    except ForgeError as error:
        raise _told(name, champion, error) from None
    return champion.digest or str(manifest["digest"])


def champion_model(
    name: str, champion: Champion, candidate: str, store: Store, settings: Settings
) -> tuple[Base, str] | None:
    """The champion as a whole model on this machine, its package verified file by file, and that model's digest.

    None where it is the candidate, which has the digest `candidate`.
    """
    digest = find_package(name, champion, store)
    try:
        package, manifest = open_package(champion.uri, digest, settings, store)
        model_digest = str(manifest.get("model_digest", digest))
        if model_digest == candidate:
            return None
        if manifest.get("kind") != ADAPTER:
            return Base(location=str(package)), model_digest
        directory = merged(package, manifest, settings, store)
    except ForgeError as error:
        raise _told(name, champion, error) from None
    its_digest = str(read_manifest(str(directory), (directory / MANIFEST).read_bytes())["digest"])
    verify(directory, its_digest)  # whose message says to delete it, which makes it again
    if its_digest != model_digest:
        # What went into it is verified: other processors round, and other releases save, in another way.
        print(
            f"evaluate: version {champion.version}, merged on this machine, is not to the byte the model that was "
            f"registered (sha256 {its_digest[:12]} and not {model_digest[:12]}); its answers are kept apart",
            flush=True,
        )
    return Base(location=str(directory)), its_digest


def merged(package: Path, manifest: dict[str, Any], settings: Settings, store: Store) -> Path:
    """An adapter's package as a whole model, made once on this machine and kept as copies of the store are.

    Raises ForgeError where its base is gone, or is not what it was.
    """
    base = Base(**manifest["base"])

    def make(staged: Path) -> None:
        import torch  # preflight has no need of these

        from tasks.weights import merge

        if Path(base.location).is_absolute() and digest_directory(Path(base.location))[0] != base.revision:
            raise ForgeError(f"its base {base.location} is gone or was changed, and is not {base.revision} any more")
        local = local_base(base, settings, store)
        merge(local, package, getattr(torch, manifest["dtype"]), staged)
        write_manifest(staged, {})

    copies = Copies(settings.home / "merged", int(settings.copies_gb * 1e9))
    return copies.get(f"sha256-{manifest['digest']}", make)


def _told(name: str, champion: Champion, error: ForgeError) -> ForgeError:
    reason, _, _ = error.message.partition("; ")
    return ForgeError(f"champion {name} version {champion.version}: {reason}; {MEND}")
