"""The package: the model's files and a manifest that names each of them. Complete when the manifest is there."""

import shutil
from pathlib import Path
from typing import Any

from tasks.storage import Store, digest_directory
from tasks.storage.manifest import verify


def build_package(model: Path, name: str, lineage: dict[str, Any], store: Store) -> tuple[str, str]:
    """Publish a directory in Hugging Face format as models/<name>/sha256-<digest>; returns its URI and digest.

    The digest is that of the model's files, so the same model is the same package. What was published is compared with
    its manifest; ForgeError where they differ.
    """
    digest, _ = digest_directory(model)
    prefix = f"models/{name}"
    uri = store.uri(f"{prefix}/sha256-{digest}")
    if not store.exists(f"{prefix}/sha256-{digest}"):
        with store.stage() as staged:
            shutil.copytree(model, staged, dirs_exist_ok=True)
            store.publish(staged, prefix, digest, {"kind": "model", "name": name, **lineage})
    verify(store.path(uri), digest)
    return uri, digest
