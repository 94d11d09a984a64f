"""The manifest of an artifact: it lists each file, is written last, and shows whether the artifact is as published."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from forge.core.digest import digest_directory
from forge.core.errors import ForgeError
from forge.storage.records import parse_or_none

MANIFEST = "manifest.json"
SIGNATURE = "model.sig"  # it signs all other files including the manifest, which therefore does not list it


class _Entry(BaseModel):
    """A file of an artifact. Its path is relative and stays inside the artifact."""

    model_config = ConfigDict(extra="allow")

    path: str
    size: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError("leads outside the artifact")
        return path


class _Manifest(BaseModel):
    """The digest of all files, their list, and any facts that the publisher added."""

    model_config = ConfigDict(extra="allow")

    digest: str
    files: list[_Entry]


def write_manifest(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of all other files in a directory: path, size and SHA-256 of each, and the given facts."""
    digest, files = digest_directory(directory, exclude={MANIFEST, SIGNATURE})
    entries = [
        {"path": path, "size": (directory / path).stat().st_size, "sha256": sha256} for path, sha256 in files.items()
    ]
    manifest = {**facts, "digest": digest, "files": entries}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(where: str, data: bytes) -> dict[str, Any]:
    """A valid manifest; raises ForgeError if it is broken or lists a file outside the artifact."""
    manifest = parse_or_none(_Manifest, data)
    if manifest is None:
        raise ForgeError(f"{MANIFEST} is broken", where=where, fix="delete it and run again")
    return manifest.model_dump()


def verify(directory: Path, digest: str) -> dict[str, Any]:
    """The manifest of a directory; raises ForgeError unless the files are those of the manifest and of this digest."""
    where, fix = f"package {directory}", "delete the package and run again"
    try:
        data = (directory / MANIFEST).read_bytes()
    except OSError:
        raise ForgeError(f"{MANIFEST} is missing", where=where, fix=fix) from None
    manifest = read_manifest(where, data)
    found, files = digest_directory(directory, exclude={MANIFEST, SIGNATURE})
    expected = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    for file in sorted(expected.keys() | files.keys()):
        if expected.get(file) != files.get(file):
            what = "missing" if file not in files else "not in the manifest" if file not in expected else "damaged"
            raise ForgeError(f"{file} is {what}", where=where, fix=fix)
    if found != digest:
        raise ForgeError(f"its digest is {found}, not {digest}", where=where, fix=fix)
    return manifest


def missing_artifact(uri: str) -> ForgeError:
    """The error for an artifact that is no longer in the store."""
    return ForgeError(
        f"{uri} is gone, though an earlier run published it",
        where="store",
        fix="build it again with pyflyte run --overwrite-cache",
    )
