"""Raw rows in S3 or in a data set on the Hugging Face Hub: identified remotely, then downloaded.

The clients are imported when needed, since most sources are local.
"""

import contextlib
import glob
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from forge.core.digest import digest_json
from forge.core.errors import ForgeError
from forge.core.full_disk import check_free_space
from forge.core.settings import Settings
from forge.storage.s3 import S3, connect, split
from forge.storage.transfer import File, download

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfUri
    from minio import Minio

log = logging.getLogger(__name__)

HUB = "hf://"
FORM = "hf://datasets/OWNER/NAME[@revision][/path]"


def is_remote(source: str) -> bool:
    """Whether a source is an S3 or Hub URI rather than a local path."""
    return source.startswith((S3, HUB))


def is_hidden(*names: str) -> bool:
    """Whether one of a path's names is hidden (.name, _name), like files that programs keep for themselves."""
    return any(name.startswith((".", "_")) and name != ".." for name in names)


def identify(source: str, settings: Settings, suffixes: tuple[str, ...]) -> tuple[str, str]:
    """The source's URI, pinned to a commit on the Hub, and the digest of its contents. Nothing is downloaded.

    `suffixes` are the endings of data files' names, in lower case. The digest of an S3 source covers the ETags and
    sizes of its objects, not their keys. Raises ForgeError if the source cannot be read or has no data file.
    """
    if source.startswith(S3):
        with connect(f"data {source}", settings) as client:
            files = _objects(client, source, suffixes)
            return source, digest_json(sorted((file.etag, file.size) for file in files))
    with _hub(source) as (api, uri):
        _repository_files(api, uri, source, suffixes)
        return uri.to_uri(), digest_json([uri.revision, uri.path_in_repo])


def download_files(
    source: str, directory: Path, settings: Settings, suffixes: tuple[str, ...]
) -> list[tuple[str, Path]]:
    """Download the data files of a source; returns the URI and local path of each, sorted by URI.

    Files are complete or absent, and none is outside the directory. Raises ForgeError if a file changes meanwhile or
    arrives damaged, if the disk is too small, and as `identify` does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if source.startswith(S3):
        with connect(f"data {source}", settings) as client:
            files = _objects(client, source, suffixes)
            check_free_space(directory, f"the rows of {source}", sum(file.size for file in files))
            bucket, _ = split(source)
            # A key may contain .. or be too long for a file name, so only its ending is used.
            paths = [directory / f"{number:06}{_suffix(file, suffixes)}" for number, file in enumerate(files)]
            download(client, bucket, list(zip(files, paths, strict=True)))
        return [(f"{S3}{bucket}/{file.name}", path) for file, path in zip(files, paths, strict=True)]
    with _hub(source) as (api, uri):
        files = _repository_files(api, uri, source, suffixes)
        check_free_space(directory, f"the rows of {source}", sum(file.size for file in files))
        api.snapshot_download(
            uri.id,
            repo_type="dataset",
            revision=uri.revision,
            local_dir=directory,
            allow_patterns=_patterns(uri.path_in_repo, suffixes),
        )
        for file in files:
            if (size := (directory / file.name).stat().st_size) != file.size:
                raise ForgeError(
                    f"{file.name} arrived with {size} bytes instead of {file.size}",
                    where=f"data {source}",
                    fix="run again",
                )
        return [(replace(uri, path_in_repo=file.name).to_uri(), directory / file.name) for file in files]


def _objects(client: "Minio", source: str, suffixes: tuple[str, ...]) -> list[File]:
    bucket, key = split(source)
    objects = client.list_objects(bucket, prefix=key, recursive=True)
    files = (File(item.object_name or "", item.size or 0, item.etag or "") for item in objects)
    return _select(source, files, key, suffixes)


@contextlib.contextmanager
def _hub(source: str) -> Iterator[tuple["HfApi", "HfUri"]]:
    """A client of the Hub and the source pinned to a commit. Errors of the client become ForgeErrors."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfUriError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import parse_hf_uri

    known = (
        (HfUriError, "not the URI of a data set", f"write it as {FORM}"),
        (GatedRepoError, "its owner restricts access", "request access on the Hub, and set HF_TOKEN"),
        (RepositoryNotFoundError, "no such data set, or a private one", "check its name, or set HF_TOKEN"),
        (RevisionNotFoundError, "no such revision", "give a branch, a tag or a commit after the @, or leave it out"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE prevents reading it", "unset that, or copy the rows here"),
    )
    try:
        uri = parse_hf_uri(source.rstrip("/"))
        if uri.type != "dataset":
            raise HfUriError(source, FORM)
        # The client itself reads HF_ENDPOINT only when it is imported.
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        commit = api.dataset_info(uri.id, revision=uri.revision, timeout=10).sha
        yield api, replace(uri, revision=commit)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        other = (f"cannot be read ({first})", "check the network, HF_ENDPOINT, HF_TOKEN and the free space")
        what, fix = next(((what, fix) for kind, what, fix in known if isinstance(error, kind)), other)
        raise ForgeError(what, where=f"data {source}", fix=fix) from None


def _repository_files(api: "HfApi", uri: "HfUri", source: str, suffixes: tuple[str, ...]) -> list[File]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(uri.id, recursive=True, revision=uri.revision, repo_type="dataset")
    files = (File(entry.path, entry.size) for entry in entries if isinstance(entry, RepoFile))
    return _select(source, files, uri.path_in_repo, suffixes)


def _patterns(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Globs of the files that `_select` selects."""
    endings = ("".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in suffix) for suffix in suffixes)
    folder = glob.escape(f"{path}/" if path else "")
    return [glob.escape(path), *(f"{folder}*{ending}" for ending in endings)]


def _select(source: str, files: Iterable[File], path: str, suffixes: tuple[str, ...]) -> list[File]:
    """The data files at a path (a file, or a directory without its hidden files), sorted; ForgeError if none."""
    inside = path.rstrip("/") + "/" if path else ""
    found = sorted(
        file
        for file in files
        if file.name == path or (file.name.startswith(inside) and not is_hidden(*file.name[len(inside) :].split("/")))
    )
    selected = [file for file in found if file.name.lower().endswith(suffixes)]
    if selected and (others := [file.name for file in found if file not in selected]):
        more = ", ..." if len(others) > 5 else ""
        log.warning(f"skipped {len(others)} files of unknown type in {source}: {', '.join(others[:5])}{more}")
    if not selected:
        known = ", ".join(suffixes)
        raise ForgeError(
            f"contains no data file (known are {known})",
            where=f"data {source}",
            fix="check the path, or put rows there",
        )
    return selected


def _suffix(file: File, suffixes: tuple[str, ...]) -> str:
    return max((suffix for suffix in suffixes if file.name.lower().endswith(suffix)), key=len)
