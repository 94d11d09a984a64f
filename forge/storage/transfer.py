"""Files to and from a bucket: several at once, in parts, compared with what was sent, and whole or not there."""

import base64
import contextlib
import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from forge.core.errors import ForgeError
from forge.storage.s3 import PASSING, S3, Damaged

if TYPE_CHECKING:
    from minio import Minio

AT_ONCE = 4  # files, and parts of files
ATTEMPTS = 4  # for what breaks off or arrives damaged; the client itself repeats requests that fail
PART = 16 << 20  # bytes that are sent at once; of the sizes tried the fastest
MOST_PARTS = 10_000  # of a file: S3's limit
CHUNK = 1 << 20  # bytes that are received at once
MOMENTARY = {"BadDigest", "IncompleteBody", "NoSuchUpload", "RequestTimeout", "XAmzContentSHA256Mismatch"}  # S3's codes
TYPE = {"Content-Type": "application/octet-stream"}
MD5 = re.compile("[0-9a-f]{32}")
T = TypeVar("T")


class File(NamedTuple):
    """A file at a source: its key or path there, its bytes, in S3 its etag, and its SHA-256 where that is known."""

    name: str
    size: int
    etag: str = ""
    sha256: str = ""


class TransferCancelled(Exception):
    """Another transfer has failed."""


def upload(
    client: "Minio", bucket: str, files: Sequence[tuple[Path, File]], tell: Callable[[int], Any] = lambda sent: None
) -> None:
    """Send files to their keys, and make sure that what arrived is what was sent; a failure ends all of it.

    `tell` is given the bytes that were sent. AT_ONCE parts are in memory at most.
    """
    stop = threading.Event()
    # Parts have a pool of their own, so that a single large file keeps all of it busy.
    with ThreadPoolExecutor(AT_ONCE) as parts, ThreadPoolExecutor(AT_ONCE) as pool:
        sending = _Sending(client, bucket, parts, stop, tell)
        largest_first = sorted(files, key=lambda one: -one[1].size)
        _finish([pool.submit(sending.send, path, file) for path, file in largest_first], stop)


class _Sending:
    """Files on their way to a bucket.

    A server tells an object's MD5 as its etag, and the etag of a large one is made of its parts' MD5s. Where it is
    something else, as with a key of KMS, the object is read back.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """

    def __init__(
        self,
        client: "Minio",
        bucket: str,
        parts: ThreadPoolExecutor,
        stop: threading.Event,
        tell: Callable[[int], Any],
    ) -> None:
        self.client, self.bucket, self.parts, self.stop, self.tell = client, bucket, parts, stop, tell
        self.own = threading.local()

    def send(self, path: Path, file: File) -> None:
        """Send one file, and compare what arrived."""
        size = part_size(file.size)
        if file.size <= size:
            compared = self.parts.submit(_again, self._part, path, file, 0, file.size, {}).result()[1]
        else:
            compared = _again(self._in_parts, path, file, size)
        if not compared and digest_there(self.client, self.bucket, file.name) != file.sha256:
            raise Damaged(file.name)

    def _in_parts(self, path: Path, file: File, size: int) -> bool:
        from minio.datatypes import Part
        from minio.error import MinioException

        upload_id = self.client._create_multipart_upload(self.bucket, file.name, dict(TYPE))
        try:
            sent = _finish(
                [
                    self.parts.submit(
                        _again, self._part, path, file, start, min(size, file.size - start),
                        {"partNumber": str(number), "uploadId": upload_id},
                    )
                    for number, start in enumerate(range(0, file.size, size), start=1)
                ],
                threading.Event(),
            )  # fmt: skip
            parts = [Part(number, etag) for number, (etag, _) in enumerate(sent, start=1)]
            try:
                self.client._complete_multipart_upload(self.bucket, file.name, upload_id, parts)
            except MinioException as error:
                # Completed already, where the answer to an earlier request was lost.
                if "NoSuchUpload" not in str(error) or not self._is_there(path, file):
                    raise
        except BaseException:
            with contextlib.suppress(Exception):  # what happened before says more; the sweep finds what is left
                self.client._abort_multipart_upload(self.bucket, file.name, upload_id)
            raise
        return all(compared for _, compared in sent)

    def _is_there(self, path: Path, file: File) -> bool:
        found = self.client.stat_object(self.bucket, file.name)
        return found.size == file.size and is_etag_of(path, (found.etag or "").strip('"'))

    def _part(self, path: Path, file: File, start: int, size: int, query: dict[str, Any]) -> tuple[str, bool]:
        """Send some bytes of a file; returns the etag, and whether it is the MD5 that it should be."""
        if self.stop.is_set():
            raise TransferCancelled
        buffer = getattr(self.own, "buffer", b"")
        if len(buffer) < size:
            buffer = self.own.buffer = bytearray(size)  # this thread's, used again: fresh memory would cost more
        data = memoryview(buffer)[:size]
        with path.open("rb") as opened:
            opened.seek(start)
            if size and opened.readinto(data) != size:
                raise ForgeError(f"{path}: changed while it was being sent; run again")
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        headers: dict[str, Any] = dict(TYPE)
        if self.client._base_url.is_https:  # where the client asks the server to compare it; otherwise it sends SHA-256
            headers["Content-MD5"] = base64.b64encode(md5).decode()
        written = self.client._put_object(self.bucket, file.name, data, headers, dict(query))  # type: ignore[arg-type]
        etag = written.etag or ""
        if MD5.fullmatch(etag) and not _encrypted(written.http_headers) and etag != md5.hex():
            raise Damaged(file.name)
        self.tell(size)
        return etag, etag == md5.hex()


def download(client: "Minio", bucket: str, files: Sequence[tuple[File, Path]], tell: Callable[[int], Any]) -> None:
    """Write objects to paths, each whole or not at all; a failure ends all of it. `tell` is given bytes."""
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        _finish([pool.submit(_again, _receive, client, bucket, file, path, stop, tell) for file, path in files], stop)


def _receive(
    client: "Minio", bucket: str, file: File, path: Path, stop: threading.Event, tell: Callable[[int], Any]
) -> None:
    staged = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    size, digest = 0, hashlib.new("sha256" if file.sha256 else "md5", usedforsecurity=False)
    response = client.get_object(bucket, file.name)
    try:
        headers = response.headers
        if headers.get("ETag", "").strip('"') != file.etag:
            raise ForgeError(f"{S3}{bucket}/{file.name}: changed while it was being read; run again")
        with staged.open("wb") as opened:
            # As stored: an object's Content-Encoding says how to show it, while its size and its etag count its bytes.
            for chunk in response.stream(CHUNK, decode_content=False):
                if stop.is_set():
                    raise TransferCancelled
                opened.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                tell(len(chunk))
        # The etag of an upload in parts holds a dash, and is no digest of the whole.
        expected = file.sha256 or (file.etag if MD5.fullmatch(file.etag) and not _encrypted(headers) else "")
        if size != file.size or (expected and digest.hexdigest() != expected):
            raise Damaged(file.name)
    except BaseException:
        tell(-size)
        raise
    finally:
        response.close()
        response.release_conn()
    staged.replace(path)


def digest_there(client: "Minio", bucket: str, name: str) -> str:
    """SHA-256 of an object, by reading it."""
    sha256 = hashlib.sha256()
    response = client.get_object(bucket, name)
    try:
        for chunk in response.stream(CHUNK, decode_content=False):
            sha256.update(chunk)
    finally:
        response.close()
        response.release_conn()
    return sha256.hexdigest()


def part_size(size: int) -> int:
    """The bytes of each part of a file of so many."""
    return max(PART, -(-size // MOST_PARTS))


def is_etag_of(path: Path, etag: str) -> bool:
    """Whether a server's etag is the usual digest of a file: its MD5, or that of the MD5s of its parts."""
    size = part_size(path.stat().st_size)
    with path.open("rb") as file:
        if "-" not in etag:
            return hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest() == etag
        parts = [hashlib.md5(part, usedforsecurity=False).digest() for part in iter(lambda: file.read(size), b"")]
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}" == etag


def _encrypted(headers: Any) -> bool:
    """Whether an etag is no digest, since the object is encrypted with a key of KMS."""
    return str(headers.get("x-amz-server-side-encryption", "")).startswith("aws:kms")


def _passing(error: BaseException) -> bool:
    """Whether it may go better the next time."""
    from minio.error import MinioException, S3Error, ServerError
    from urllib3.exceptions import HTTPError, MaxRetryError

    if isinstance(error, MaxRetryError):  # the client has repeated it already
        return False
    if isinstance(error, S3Error):
        return error.response.status in PASSING or error.code in MOMENTARY
    if isinstance(error, ServerError):
        return error.status_code in PASSING
    return isinstance(error, MinioException | HTTPError | Damaged)


# Each call waits apart, so that what failed together does not come back together.
_again = Retrying(
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_random_exponential(multiplier=0.2, max=5),
    retry=retry_if_exception(_passing),
    reraise=True,
)


def _finish(futures: "Iterable[Future[T]]", stop: threading.Event) -> list[T]:
    """The results of all; after a failure, that one is raised, and the rest is not begun, or ends early."""
    futures = list(futures)
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [error for future in done if (error := future.exception()) is not None]
        if failed:
            raise min(failed, key=lambda error: isinstance(error, TransferCancelled))
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        raise
