"""The package: the model's files and a manifest that names each of them. Complete when the manifest is there."""

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.storage import DirectoryStore, digest_directory
from tasks.storage.package import MANIFEST, verify_package


def build_package(model: Path, name: str, lineage: dict[str, Any], store: DirectoryStore) -> tuple[str, str]:
    """Publish a directory in Hugging Face format as models/<name>/sha256-<digest>; returns its URI and digest.

    The digest is that of the model's files, so the same model is the same package. What was published is read back
    and compared with its manifest; ForgeError where they differ.
    """
    digest, files = digest_directory(model)
    prefix = f"models/{name}"
    if store.exists(f"{prefix}/sha256-{digest}"):
        uri = store.uri(f"{prefix}/sha256-{digest}")
        verify_package(store.path(uri), digest)
        return uri, digest
    with store.stage() as staged:
        shutil.copytree(model, staged, dirs_exist_ok=True)
        sizes = {file: (staged / file).stat().st_size for file in files}
        manifest = {
            "kind": "model",
            "name": name,
            "digest": digest,
            "files": [{"path": file, "size": sizes[file], "sha256": sha256} for file, sha256 in files.items()],
            **lineage,
        }
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        uri = store.publish(staged, prefix, digest)
    verify_package(store.path(uri), digest)
    return uri, digest
