"""The package: the files of a model or of an adapter, the card, and the manifest of both, signed where a key is set."""

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

    `facts` are what the manifest and the card say of the model; they hold nothing that another attempt would say
    differently, so that the same model with the same evaluation is the same package to the byte. What was there before
    is compared with its manifest, as what is sent is compared with what arrives; ForgeError where they differ.
    """
    prefix = f"models/{facts['name']}"
    before = False

    def seal(directory: Path) -> None:
        nonlocal before
        digest = json.loads((directory / MANIFEST).read_text())["digest"]
        before = store.exists(f"{prefix}/sha256-{digest}")
        sign(directory, settings)

    with store.stage() as staged:
        shutil.copytree(model, staged, dirs_exist_ok=True, copy_function=_link)
        (staged / CARD).unlink(missing_ok=True)  # a base model's own, which says nothing of this one
        (staged / CARD).write_text(model_card(facts), encoding="utf-8")
        uri = store.publish(staged, prefix, facts=facts, seal=seal)
    digest = uri.rpartition("sha256-")[2]
    ensure_signed(uri, settings, store)
    if before or settings.verify_key is not None:
        open_package(uri, digest, settings, store)
    return uri, digest


def ensure_signed(uri: str, settings: Settings, store: Store) -> None:
    """Sign a package that was published before there was a key, where there is one now."""
    if settings.signing_key is None or signature_of(uri, store) is not None:
        return
    with store.stage() as staged:
        shutil.copytree(store.path(uri), staged, dirs_exist_ok=True, copy_function=_link)
        sign(staged, settings)
        store.attach(uri, SIGNATURE, (staged / SIGNATURE).read_bytes())


def _link(source: str, target: str) -> None:
    """The same file under another name, since neither is ever changed; a copy where that cannot be."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
