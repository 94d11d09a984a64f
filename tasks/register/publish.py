"""Publishing a package: the files of a model or adapter, its card and its manifest; signed if a key is set."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from forge.core.settings import Settings
from forge.registry.packages import open_package, signature_of
from forge.registry.signature import sign
from forge.storage import Store
from forge.storage.manifest import MANIFEST, SIGNATURE
from tasks.register.model_card import CARD, model_card


def build_package(model: Path, facts: dict[str, Any], settings: Settings, store: Store) -> tuple[str, str]:
    """Publish a model or an adapter as models/<name>/sha256-<digest>; returns its URI and digest.

    `facts` go into the manifest and the card. They must be the same in every attempt, so that the same model with the
    same evaluation gives a byte-identical package. If the package exists already, its files are verified; ForgeError
    if they differ from the manifest.
    """
    prefix = f"models/{facts['name']}"
    existed = False

    def seal(directory: Path) -> None:
        nonlocal existed
        digest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["digest"]
        existed = store.exists(f"{prefix}/sha256-{digest}")
        sign(directory, settings)

    with store.stage("the package") as staged:
        shutil.copytree(model, staged, dirs_exist_ok=True, copy_function=_link)
        (staged / CARD).unlink(missing_ok=True)  # may be the base model's card
        (staged / CARD).write_text(model_card(facts), encoding="utf-8")
        uri = store.publish(staged, prefix, facts=facts, seal=seal)
    digest = uri.rpartition("sha256-")[2]
    ensure_signed(uri, settings, store)
    if existed or settings.verify_key is not None:
        open_package(uri, digest, settings, store)
    return uri, digest


def ensure_signed(uri: str, settings: Settings, store: Store) -> None:
    """Sign a package that was published before a signing key was set."""
    if settings.signing_key is None or signature_of(uri, store) is not None:
        return
    with store.stage("the signature") as staged:
        shutil.copytree(store.path(uri), staged, dirs_exist_ok=True, copy_function=_link)
        sign(staged, settings)
        store.attach(uri, SIGNATURE, (staged / SIGNATURE).read_bytes())


def _link(source: str, target: str) -> None:
    """Hard-link a file, since published files never change; copy it if that fails."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
