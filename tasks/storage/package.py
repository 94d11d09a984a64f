"""What every package in the store has: a manifest that names each file, and tells whether all of it is as published."""

import json
from pathlib import Path

from tasks.errors import ForgeError
from tasks.storage.digest import digest_directory

MANIFEST = "manifest.json"


def verify_package(package: Path, digest: str) -> None:
    """Raise ForgeError, naming the file, unless the package's files are those of its manifest and digest."""
    try:
        manifest = json.loads((package / MANIFEST).read_text())
        expected = {file["path"]: file["sha256"] for file in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ForgeError(
            f"package {package}: {MANIFEST} is missing or broken; delete the package and run again"
        ) from None
    found, files = digest_directory(package, exclude={MANIFEST})
    for file in sorted(expected.keys() | files.keys()):
        if expected.get(file) != files.get(file):
            what = "missing" if file not in files else "not in the manifest" if file not in expected else "damaged"
            raise ForgeError(f"package {package}: {file} is {what}; delete the package and run again")
    if found != digest:
        raise ForgeError(f"package {package}: its digest is {found}, not {digest}; delete the package and run again")
