"""Where raw rows are: a file, a directory, a glob, a bucket, a data set of the hub, or the demonstration."""

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from forge.core.digest import digest_file, digest_json
from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.core.settings import load_settings, path_of
from forge.storage.remote_files import download_files, identify, is_remote
from tasks.preprocess import demonstration
from tasks.preprocess.formats import BLOCK, SUFFIXES, Block, RawFile, read_blocks

log = logging.getLogger(__name__)

DEMONSTRATION = "demonstration"
READABLE = "JSONL, JSON, CSV, TSV (also as .gz or .zst) or Parquet"


def find_files(source: str) -> list[RawFile]:
    """The files of a local source, sorted by name; ForgeError if there are none or one cannot be read."""
    path = path_of(source)
    try:
        return _local_files(path)
    except OSError as error:
        raise ForgeError(
            f"data {error.filename or path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None


def _local_files(path: Path) -> list[RawFile]:
    if path.is_dir():
        inside = _inside(path)
        files = sorted(found for found in inside if found.name.lower().endswith(SUFFIXES))
    elif path.exists():
        files = [path]
    elif glob.has_magic(str(path)):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
    else:
        raise ForgeError(
            f"data {path}: no such file or directory; give the path of a file, a directory or a glob ({READABLE})"
        )
    if not files:
        raise ForgeError(f"data {path}: there are no rows there; put them there as {READABLE}")
    for file in files:
        if not file.name.lower().endswith(SUFFIXES):
            raise ForgeError(f"data {file}: the name does not say what it is; rows are read from {READABLE} by suffix")
        with file.open("rb") as opened:
            empty = not opened.read(1)
        if empty:
            raise ForgeError(f"data {file}: the file is empty; fill it or remove it")
    return [RawFile(str(file), file) for file in files]


def _inside(path: Path) -> list[Path]:
    """All files in a directory and those below it, but for hidden ones (.name, _name)."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for directory, directories, names in os.walk(path, onerror=fail):
        directories[:] = [name for name in directories if not name.startswith((".", "_"))]
        found += [Path(directory, name) for name in names if not name.startswith((".", "_"))]
    return found


def _tell_unread(path: Path) -> None:
    others = sorted(file.name for file in _inside(path) if not file.name.lower().endswith(SUFFIXES))
    if others:
        more = ", ..." if len(others) > 5 else ""
        log.warning(f"{len(others)} files in {path} are of no known kind, not read: {', '.join(others[:5])}{more}")


def fetch_files(source: str, directory: Path) -> list[RawFile]:
    """The files of a source; those of a bucket or of the hub are first copied into the directory."""
    if not is_remote(source):
        files = find_files(source)
        if (path := path_of(source)).is_dir():
            _tell_unread(path)
        return files
    log.info(f"copying {source}")
    return [RawFile(name, path) for name, path in download_files(source, directory, load_settings(), SUFFIXES)]


def pin(recipe: DataRecipe, source: str) -> tuple[str, str]:
    """The source's URI, pinned where it can be, and the digest of its contents (not of paths or times)."""
    if source == DEMONSTRATION:
        return source, demonstration.digest(recipe.demonstration)
    if is_remote(source):
        return identify(source, load_settings(), SUFFIXES)
    return source, digest_json(sorted(digest_file(file.path) for file in find_files(source)))


def digest_source(recipe: DataRecipe) -> str:
    """Identity of all raw rows of a recipe, those of its own to evaluate on included."""
    digests = [pin(recipe, source)[1] for source in (recipe.source, recipe.heldout_source) if source]
    return digests[0] if len(digests) == 1 else digest_json(digests)


def blocks_of(recipe: DataRecipe, source: str, directory: Path) -> Iterator[Block]:
    """All rows of a source, in blocks."""
    if source != DEMONSTRATION:
        yield from read_blocks(fetch_files(source, directory))
        return
    rows = list(enumerate(demonstration.rows(recipe.demonstration), 1))
    size = BLOCK // 1024
    for order, start in enumerate(range(0, len(rows), size)):
        yield Block(order, DEMONSTRATION, start + 1, rows[start : start + size])
