"""The manifest of an artifact: it names each file, is written last, and tells whether all of it is as published."""

import json
from pathlib import Path
from typing import Any

from forge.core.digest import digest_directory
from forge.core.errors import ForgeError

MANIFEST = "manifest.json"
SIGNATURE = "model.sig"  # of all other files, the manifest included, which therefore does not name it


def write_manifest(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of all other files in a directory: path, size and SHA-256 of each, and what else is known."""
    digest, files = digest_directory(directory, exclude={MANIFEST, SIGNATURE})
    entries = [
        {"path": path, "size": (directory / path).stat().st_size, "sha256": sha256} for path, sha256 in files.items()
    ]
    manifest = {**facts, "digest": digest, "files": entries}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(where: str, data: bytes) -> dict[str, Any]:
    """A manifest whose entries are as they should be; ForgeError where it is broken, or names a file outside."""
    try:
        manifest = json.loads(data)
        for entry in manifest["files"]:
            path, _, _ = Path(entry["path"]), int(entry["size"]), str(entry["sha256"])
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(entry["path"])
        _ = str(manifest["digest"])
    except (ValueError, KeyError, TypeError):
        raise ForgeError(f"{where}: {MANIFEST} is broken; delete it and run again") from None
    return dict(manifest)


def verify(directory: Path, digest: str) -> dict[str, Any]:
    """A directory's manifest; ForgeError, naming the file, unless its files are the manifest's, and of this digest."""
    where = f"package {directory}"
    try:
        data = (directory / MANIFEST).read_bytes()
    except OSError:
        raise ForgeError(f"{where}: {MANIFEST} is missing; delete the package and run again") from None
    manifest = read_manifest(where, data)
    found, files = digest_directory(directory, exclude={MANIFEST, SIGNATURE})
    expected = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    for file in sorted(expected.keys() | files.keys()):
        if expected.get(file) != files.get(file):
            what = "missing" if file not in files else "not in the manifest" if file not in expected else "damaged"
            raise ForgeError(f"{where}: {file} is {what}; delete the package and run again")
    if found != digest:
        raise ForgeError(f"{where}: its digest is {found}, not {digest}; delete the package and run again")
    return manifest


def gone(uri: str) -> ForgeError:
    """What is said of an artifact that is not there."""
    return ForgeError(
        f"store: {uri} is gone, though an earlier run made it; to make it again, run with --overwrite-cache (pyflyte "
        "run --overwrite-cache ...)"
    )
