"""Where raw rows come from: a file, a directory, a glob, a bucket, a data set on the Hub, or the demonstration."""

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from forge.core.digest import digest_file, digest_json
from forge.core.errors import ForgeError, printable
from forge.core.recipe import DataRecipe
from forge.core.settings import load_settings, path_of
from forge.storage.remote_files import download_files, identify, is_hidden, is_remote
from tasks.preprocess import demonstration
from tasks.preprocess.file_formats import BLOCK, SUFFIXES, TEXT, Block, RawFile, read_blocks

log = logging.getLogger(__name__)

DEMONSTRATION = "demonstration"
ENDINGS = f"{', '.join(TEXT)} (each also with .gz or .zst after it) or .parquet"
READABLE = "JSONL, JSON, CSV, TSV (also as .gz or .zst) or Parquet"


def find_files(source: str) -> list[RawFile]:
    """The files of a local source, sorted by name; ForgeError if there are none or one cannot be read."""
    path = path_of(source)
    if "\0" in source:
        raise ForgeError("a path cannot hold a NUL character", where=f"data {source!r}", fix="remove it")
    try:
        return _local_files(path)
    except OSError as error:
        raise ForgeError(
            f"cannot be read ({error.strerror})",
            where=f"data {error.filename or path}",
            fix="check the path and its permissions",
        ) from None


def _local_files(path: Path) -> list[RawFile]:
    if not path.exists() and not glob.has_magic(str(path)):
        raise ForgeError(
            "no such file or directory",
            where=f"data {path}",
            fix=f"give the path of a file, a directory or a glob ({READABLE})",
        )
    files = [file for found in _found(path) for file in _readable(found)]
    if not files:
        raise ForgeError("no files of rows found", where=f"data {path}", fix=f"add rows as {READABLE}")
    # A file and the links to it are one; the first name is used.
    files = sorted({os.path.realpath(file): file for file in sorted(files, reverse=True)}.values())
    for file in files:
        _check_file(file)
    return [RawFile(str(file), file) for file in files]


def _found(path: Path) -> list[Path]:
    """The file or directory of a path, or those that match a glob, without hidden directories."""
    if path.exists():
        return [path]
    matches = [Path(name) for name in glob.glob(_pattern(path), recursive=True)]
    return [match for match in matches if not (is_hidden(match.name) and match.is_dir())]


def _readable(path: Path) -> list[Path]:
    """A file, whatever its name, or the data files in a directory."""
    return [file for file in _files_below(path) if file.name.lower().endswith(SUFFIXES)] if path.is_dir() else [path]


def _pattern(path: Path) -> str:
    """A glob in which the directories that exist as they are written, such as `[a]`, stand for themselves."""
    literal = next(parent for parent in path.parents if parent.exists())
    return os.path.join(glob.escape(str(literal)), path.relative_to(literal))


def _check_file(file: Path) -> None:
    """Raise ForgeError if a file is not of a known kind, is no plain file or is empty; OSError if it cannot be read."""
    if not file.name.lower().endswith(SUFFIXES):
        raise ForgeError("unknown file type", where=f"data {file}", fix=f"its name must end in {ENDINGS}")
    if (name := printable(str(file))) != str(file):
        raise ForgeError("the name is not UTF-8", where=f"data {name}", fix="rename the file or its directory")
    if file.exists() and not file.is_file():  # reading a pipe would wait for its writer
        raise ForgeError("not a plain file", where=f"data {file}", fix="copy its rows to a file")
    with file.open("rb") as opened:
        if not opened.read(1):
            raise ForgeError("the file is empty", where=f"data {file}", fix="fill it or remove it")


def _files_below(path: Path) -> list[Path]:
    """All files in a directory and its subdirectories, linked ones too, except hidden ones (.name, _name)."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    seen: set[str] = set()
    for directory, directories, names in os.walk(path, onerror=fail, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:  # a link to a directory above it
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(name for name in directories if not is_hidden(name))
        files += [Path(directory, name) for name in names if not is_hidden(name)]
    return files


def _warn_of_skipped_files(path: Path) -> None:
    others = sorted(file.name for file in _files_below(path) if not file.name.lower().endswith(SUFFIXES))
    if others:
        more = ", ..." if len(others) > 5 else ""
        log.warning(f"skipped {len(others)} files of unknown type in {path}: {', '.join(others[:5])}{more}")


def fetch_files(source: str, directory: Path) -> list[RawFile]:
    """The files of a source; those of a bucket or of the Hub are first downloaded into the directory."""
    if not is_remote(source):
        files = find_files(source)
        for path in _found(path_of(source)):
            if path.is_dir():
                _warn_of_skipped_files(path)
        return files
    log.info(f"downloading {source}")
    return [RawFile(name, path) for name, path in download_files(source, directory, load_settings(), SUFFIXES)]


def pin(recipe: DataRecipe, source: str) -> tuple[str, str]:
    """The source's URI, with its revision if it has one, and a digest of its contents (not of paths or times)."""
    if source == DEMONSTRATION:
        return source, demonstration.digest(recipe.demonstration)
    if is_remote(source):
        return identify(source, load_settings(), SUFFIXES)
    return source, digest_json(sorted(digest_file(file.path) for file in find_files(source)))


def digest_source(recipe: DataRecipe) -> str:
    """Digest of all raw rows of a recipe, including a separate held-out source."""
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
