"""Raw rows kept elsewhere: in S3, or in a data set on the Hugging Face Hub. Identified where they are, then downloaded.

The clients are imported when they are needed: the doors that import this module seldom meet a remote source.
"""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from tasks.errors import ForgeError
from tasks.settings import Settings
from tasks.storage.digest import digest_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfUri
    from minio import Minio

S3 = "s3://"
HUB = "hf://"
FORM = "hf://datasets/OWNER/NAME[@revision][/path]"
CONNECTIONS = 8
ATTEMPTS = 3  # for a transfer that breaks off or arrives damaged; the clients retry requests that fail themselves
CHUNK = 1 << 20  # bytes
CONNECT = 5  # seconds
MD5 = re.compile("[0-9a-f]{32}")


class File(NamedTuple):
    """A file at a source: its key or path there, its bytes, and in S3 its etag."""

    name: str
    size: int
    etag: str = ""


def is_remote(source: str) -> bool:
    """Whether a source is a URI of S3 or of the Hub, rather than a local path."""
    return source.startswith((S3, HUB))


def identify(source: str, settings: Settings, suffixes: tuple[str, ...]) -> tuple[str, str]:
    """The source's URI, pinned to a commit on the Hub, and the digest of what it holds; nothing is downloaded.

    `suffixes` are the endings of data files' names, in lower case. The digest of an S3 source is that of its objects'
    etags and sizes, not of their keys. ForgeError where it cannot be reached or holds no data file.
    """
    if source.startswith(S3):
        with connect(f"data {source}", settings) as client:
            files = _objects(client, source, suffixes)
            return source, digest_json(sorted((file.etag, file.size) for file in files))
    with _hub(source) as (api, uri):
        _repository_files(api, uri, source, suffixes)
        return uri.to_uri(), digest_json([uri.revision, uri.path_in_repo])


def fetch(source: str, directory: Path, settings: Settings, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Download a source's data files; returns each one's URI and local path, sorted by URI.

    Files are whole or not there, and none lies outside the directory. ForgeError where a file changes meanwhile or
    arrives damaged, where the disk is too small, and as in `identify`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if source.startswith(S3):
        with connect(f"data {source}", settings) as client:
            files = _objects(client, source, suffixes)
            _check_room(source, files, directory)
            bucket, _ = split(source)
            # Keys may hold anything, .. and names too long for a file included: only the ending is kept.
            paths = [directory / f"{number:06}{_suffix(file, suffixes)}" for number, file in enumerate(files)]
            stop = threading.Event()
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                try:
                    list(pool.map(lambda file, path: download(client, bucket, file, path, stop), files, paths))
                except BaseException:
                    stop.set()
                    raise
        return [(f"{S3}{bucket}/{file.name}", path) for file, path in zip(files, paths, strict=True)]
    with _hub(source) as (api, uri):
        files = _repository_files(api, uri, source, suffixes)
        _check_room(source, files, directory)
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
                    f"data {source}: {file.name} arrived with {size} bytes instead of {file.size}; run again"
                )
        return [(replace(uri, path_in_repo=file.name).to_uri(), directory / file.name) for file in files]


@contextlib.contextmanager
def connect(what: str, settings: Settings, sending: float = CONNECT) -> Iterator["Minio"]:
    """A client of the S3 server that the settings name; what it raises becomes a ForgeError about `what`.

    `sending` is in how many seconds a request must be sent, connecting included: whoever uploads wants more of them.
    """
    from minio import Minio
    from minio.error import MinioException, S3Error
    from urllib3 import PoolManager, Retry, Timeout
    from urllib3.exceptions import HTTPError

    given = {
        "FORGE_S3_ENDPOINT": settings.s3_endpoint,
        "FORGE_S3_ACCESS_KEY": settings.s3_access_key.get_secret_value(),
        "FORGE_S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
    }
    if missing := [name for name, value in given.items() if not value]:
        raise ForgeError(f"{what}: S3 needs a server and credentials; set {', '.join(missing)}")
    endpoint, access_key, secret_key = given.values()
    url = urlsplit(endpoint)
    # The client's own limits, five minutes and five retries, would wait half an hour for a server that is not there.
    http = PoolManager(
        maxsize=CONNECTIONS,
        timeout=Timeout(connect=sending, read=20),  # urllib3 sends under the limit to connect
        retries=Retry(total=5, connect=2, read=2, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
    )
    try:
        yield Minio(
            url.netloc,
            access_key,
            secret_key,
            secure=url.scheme == "https",
            region=settings.s3_region,
            http_client=http,
        )
    except S3Error as error:
        mends = {
            "NoSuchBucket": "check the bucket's name and FORGE_S3_ENDPOINT",
            "NoSuchKey": "an object was removed meanwhile; run again",
            "PermanentRedirect": "check FORGE_S3_REGION",
            "AuthorizationHeaderMalformed": "check FORGE_S3_REGION",
        }
        mend = mends.get(error.code or "", "check FORGE_S3_ACCESS_KEY, FORGE_S3_SECRET_KEY and what they may read")
        raise ForgeError(f"{what}: {endpoint} answers {error.code} ({error.message}); {mend}") from None
    except HTTPError as error:
        reason = getattr(error, "reason", None) or error
        raise ForgeError(
            f"{what}: {endpoint} cannot be read ({reason}); check FORGE_S3_ENDPOINT and the network"
        ) from None
    except (MinioException, SyntaxError):  # ElementTree's errors are SyntaxErrors
        raise ForgeError(
            f"{what}: {endpoint} does not answer as S3 does; give FORGE_S3_ENDPOINT the port of its S3 API"
        ) from None
    except ValueError as error:
        raise ForgeError(f"{what}: {error}; mend the name, or FORGE_S3_ENDPOINT or FORGE_S3_REGION") from None
    except OSError as error:
        raise ForgeError(f"{what}: cannot be written here ({error}); free space, or set FORGE_HOME") from None


def _objects(client: "Minio", source: str, suffixes: tuple[str, ...]) -> list[File]:
    bucket, key = split(source)
    objects = client.list_objects(bucket, prefix=key, recursive=True)
    files = (File(item.object_name or "", item.size or 0, item.etag or "") for item in objects)
    return _select(source, files, key, suffixes)


def split(source: str) -> tuple[str, str]:
    """The bucket and the key or prefix of an S3 URI."""
    bucket, _, key = source.removeprefix(S3).partition("/")
    return bucket, key


def download(client: "Minio", bucket: str, file: File, path: Path, stop: threading.Event) -> None:
    """Write one object to a path, whole or not at all; ends early where told to stop."""
    from urllib3.exceptions import ProtocolError, ReadTimeoutError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(client, bucket, file, path, stop)
        except (ProtocolError, ReadTimeoutError):
            if attempt == ATTEMPTS:
                raise
        else:
            return


def _transfer(client: "Minio", bucket: str, file: File, path: Path, stop: threading.Event) -> None:
    from urllib3.exceptions import ProtocolError

    staged = path.with_name(f"{path.name}.part")
    size, md5 = 0, hashlib.md5(usedforsecurity=False)
    response = client.get_object(bucket, file.name)
    try:
        headers = response.headers
        if headers.get("ETag", "").strip('"') != file.etag:
            raise ForgeError(f"data {S3}{bucket}/{file.name}: changed while it was being read; run again")
        with staged.open("wb") as opened:
            # As stored: an object's Content-Encoding says how to show it, while its size and its etag count its bytes.
            for chunk in response.stream(CHUNK, decode_content=False):
                if stop.is_set():
                    return
                opened.write(chunk)
                md5.update(chunk)
                size += len(chunk)
    finally:
        response.close()
        response.release_conn()
    # The etag of a multipart upload holds a dash; that of an object encrypted with a key of KMS is no digest either.
    plain = MD5.fullmatch(file.etag) and not headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
    if size != file.size or (plain and md5.hexdigest() != file.etag):
        raise ProtocolError(f"{file.name} arrived damaged {ATTEMPTS} times")
    staged.replace(path)


@contextlib.contextmanager
def _hub(source: str) -> Iterator[tuple["HfApi", "HfUri"]]:
    """A client of the Hub and the source pinned to a commit; what the client raises becomes a ForgeError."""
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

    mends = (
        (HfUriError, f"not the URI of a data set; write it as {FORM}"),
        (GatedRepoError, "its owner grants access to it; ask for that on the Hub, and set HF_TOKEN"),
        (RepositoryNotFoundError, "no such data set, or a private one; check its name, or set HF_TOKEN"),
        (RevisionNotFoundError, "no such revision; give a branch, a tag or a commit after the @, or leave it out"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE keeps it from being read; unset that, or copy the rows here"),
    )
    try:
        uri = parse_hf_uri(source.rstrip("/"))
        if uri.type != "dataset":
            raise HfUriError(source, FORM)
        # The client reads HF_ENDPOINT when it is imported; a setting counts when it is used.
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        commit = api.dataset_info(uri.id, revision=uri.revision, timeout=10).sha
        yield api, replace(uri, revision=commit)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        other = f"cannot be read ({first}); check the network, HF_ENDPOINT, HF_TOKEN and the free space"
        mend = next((mend for kind, mend in mends if isinstance(error, kind)), other)
        raise ForgeError(f"data {source}: {mend}") from None


def _repository_files(api: "HfApi", uri: "HfUri", source: str, suffixes: tuple[str, ...]) -> list[File]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(uri.id, recursive=True, revision=uri.revision, repo_type="dataset")
    files = (File(entry.path, entry.size) for entry in entries if isinstance(entry, RepoFile))
    return _select(source, files, uri.path_in_repo, suffixes)


def _patterns(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Globs of what `_select` selects."""
    endings = ("".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in suffix) for suffix in suffixes)
    folder = glob.escape(f"{path}/" if path else "")
    return [glob.escape(path), *(f"{folder}*{ending}" for ending in endings)]


def _select(source: str, files: Iterable[File], path: str, suffixes: tuple[str, ...]) -> list[File]:
    """The data files at a path, itself a file or a directory, sorted; ForgeError if there are none."""
    inside = path.rstrip("/") + "/" if path else ""
    selected = sorted(
        file
        for file in files
        if (file.name == path or file.name.startswith(inside)) and file.name.lower().endswith(suffixes)
    )
    if not selected:
        known = ", ".join(suffixes)
        raise ForgeError(f"data {source}: holds no data file (known are {known}); check the path, or put rows there")
    return selected


def _suffix(file: File, suffixes: tuple[str, ...]) -> str:
    return max((suffix for suffix in suffixes if file.name.lower().endswith(suffix)), key=len)


def _check_room(source: str, files: list[File], directory: Path) -> None:
    needed, free = sum(file.size for file in files), shutil.disk_usage(directory).free
    if needed > free:
        raise ForgeError(
            f"data {source}: {needed:,} bytes, but {directory} has room for {free:,}; free space, or set FORGE_HOME"
        )
