"""Files to and from a bucket: several in parallel, in parts, verified, and each complete or absent."""

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

from forge.core.errors import ForgeError
from forge.storage import s3_requests
from forge.storage.s3 import S3
from forge.storage.s3_errors import Damaged, code_of, retry

if TYPE_CHECKING:
    from minio import Minio

PARALLEL = 4  # files, and parts of files
PART = 16 << 20  # bytes of a part; the fastest of the sizes measured
MAX_PARTS = 10_000  # of a file; S3's limit
CHUNK = 1 << 20  # bytes received at a time
TYPE = {"Content-Type": "application/octet-stream"}
MD5 = re.compile("[0-9a-f]{32}")
T = TypeVar("T")


class File(NamedTuple):
    """A file at a source: its key or path there, its size in bytes, its ETag in S3, and its SHA-256 if known."""

    name: str
    size: int
    etag: str = ""
    sha256: str = ""


class TransferCancelled(Exception):
    """Another transfer has failed."""


def upload(
    client: "Minio", bucket: str, files: Sequence[tuple[Path, File]], report: Callable[[int], Any] = lambda sent: None
) -> None:
    """Send files to their keys and verify what arrived. The first failure cancels the rest.

    Calls `report` with the number of bytes sent since the last call. Holds at most PARALLEL parts in memory.
    """
    stop = threading.Event()
    # Parts have a thread pool of their own, so that a single large file uses all of it.
    with ThreadPoolExecutor(PARALLEL) as parts, ThreadPoolExecutor(PARALLEL) as pool:
        uploader = _Uploader(client, bucket, parts, stop, report)
        largest_first = sorted(files, key=lambda item: -item[1].size)
        _finish([pool.submit(uploader.send, path, file) for path, file in largest_first], stop)


class _Uploader:
    """Sends files to a bucket.

    The ETag that a server returns is the MD5 of the data; that of a multipart upload is computed from the MD5s of its
    parts. If it is something else, as with KMS encryption, the object is read back instead.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """

    def __init__(
        self,
        client: "Minio",
        bucket: str,
        parts: ThreadPoolExecutor,
        stop: threading.Event,
        report: Callable[[int], Any],
    ) -> None:
        self.client, self.bucket, self.parts, self.stop, self.report = client, bucket, parts, stop, report
        self.thread = threading.local()

    def send(self, path: Path, file: File) -> None:
        """Send one file and verify what arrived."""
        size = part_size(file.size)
        if file.size <= size:
            verified = self.parts.submit(retry, self._send_part, path, file, 0, file.size).result()[1]
        else:
            verified = retry(self._send_in_parts, path, file, size)
        if not verified and object_sha256(self.client, self.bucket, file.name) != file.sha256:
            raise Damaged(file.name)

    def _send_in_parts(self, path: Path, file: File, size: int) -> bool:
        """Send a file as parts of this size; returns whether the ETag of each is its MD5."""
        upload_id = s3_requests.create_upload(self.client, self.bucket, file.name, TYPE)
        try:
            sent = _finish(
                [
                    self.parts.submit(
                        retry, self._send_part, path, file, start, min(size, file.size - start), (upload_id, number)
                    )
                    for number, start in enumerate(range(0, file.size, size), start=1)
                ],
                threading.Event(),
            )
            self._complete(path, file, upload_id, [etag for etag, _ in sent])
        except BaseException:
            with contextlib.suppress(Exception):  # the first error says more; a later sweep aborts the upload
                s3_requests.abort_upload(self.client, self.bucket, file.name, upload_id)
            raise
        return all(verified for _, verified in sent)

    def _complete(self, path: Path, file: File, upload_id: str, etags: list[str]) -> None:
        from minio.error import MinioException

        try:
            s3_requests.complete_upload(self.client, self.bucket, file.name, upload_id, etags)
        except MinioException as error:
            # The upload is complete already if the answer to an earlier request was lost.
            if code_of(error) != "NoSuchUpload" or not self._has_arrived(path, file):
                raise

    def _has_arrived(self, path: Path, file: File) -> bool:
        found = self.client.stat_object(self.bucket, file.name)
        return found.size == file.size and matches_etag(path, (found.etag or "").strip('"'))

    def _send_part(
        self, path: Path, file: File, start: int, size: int, part: tuple[str, int] | None = None
    ) -> tuple[str, bool]:
        """Send `size` bytes of a file, as a part (upload ID and number) or as the whole object.

        Returns the ETag, and whether it is the MD5 of these bytes.
        """
        if self.stop.is_set():
            raise TransferCancelled
        data = self._read(path, start, size)
        md5 = hashlib.md5(data, usedforsecurity=False)
        # The server compares the MD5 with what it receives. Without TLS the client adds a SHA-256.
        headers = TYPE | {"Content-MD5": base64.b64encode(md5.digest()).decode()}
        if part is None:
            written = s3_requests.put(self.client, self.bucket, file.name, data, headers)
        else:
            written = s3_requests.put_part(self.client, self.bucket, file.name, data, headers, *part)
        etag = written.etag or ""
        if MD5.fullmatch(etag) and not _encrypted(written.http_headers) and etag != md5.hexdigest():
            raise Damaged(file.name)
        self.report(size)
        return etag, etag == md5.hexdigest()

    def _read(self, path: Path, start: int, size: int) -> memoryview:
        """Bytes of a file, in a buffer that the thread uses again."""
        buffer = getattr(self.thread, "buffer", b"")
        if len(buffer) < size:
            buffer = self.thread.buffer = bytearray(size)
        data = memoryview(buffer)[:size]
        with path.open("rb") as file:
            file.seek(start)
            if size and file.readinto(data) != size:
                raise ForgeError("changed during the upload", where=str(path), fix="run again")
        return data


def download(
    client: "Minio", bucket: str, files: Sequence[tuple[File, Path]], report: Callable[[int], Any] = lambda done: None
) -> None:
    """Write objects to paths, each complete or absent. The first failure cancels the rest.

    Calls `report` with the number of bytes received since the last call; it is negative when a file starts over.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(PARALLEL) as pool:
        _finish([pool.submit(retry, _receive, client, bucket, file, path, stop, report) for file, path in files], stop)


def _receive(
    client: "Minio", bucket: str, file: File, path: Path, stop: threading.Event, report: Callable[[int], Any]
) -> None:
    staged = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    size, digest = 0, hashlib.new("sha256" if file.sha256 else "md5", usedforsecurity=False)
    response = client.get_object(bucket, file.name)
    try:
        headers = response.headers
        if headers.get("ETag", "").strip('"') != file.etag:
            raise ForgeError("changed during the download", where=f"{S3}{bucket}/{file.name}", fix="run again")
        with staged.open("wb") as opened:
            # Size and ETag are those of the stored bytes, whatever the object's Content-Encoding.
            for chunk in response.stream(CHUNK, decode_content=False):
                if stop.is_set():
                    raise TransferCancelled
                opened.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                report(len(chunk))
        # The ETag of a multipart upload contains a dash, and is not the MD5 of the object.
        expected = file.sha256 or (file.etag if MD5.fullmatch(file.etag) and not _encrypted(headers) else "")
        if size != file.size or (expected and digest.hexdigest() != expected):
            raise Damaged(file.name)
    except BaseException:
        report(-size)
        raise
    finally:
        response.close()
        response.release_conn()
    staged.replace(path)


def object_sha256(client: "Minio", bucket: str, name: str) -> str:
    """SHA-256 of an object, which is read for it."""
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
    """The bytes of each part of a file of this size."""
    return max(PART, -(-size // MAX_PARTS))


def matches_etag(path: Path, etag: str) -> bool:
    """Whether an ETag is the usual digest of a file: its MD5, or the MD5 of the MD5s of its parts."""
    size = part_size(path.stat().st_size)
    with path.open("rb") as file:
        if "-" not in etag:
            return hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest() == etag
        parts = [hashlib.md5(part, usedforsecurity=False).digest() for part in iter(lambda: file.read(size), b"")]
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}" == etag


def _encrypted(headers: Any) -> bool:
    """Whether the object is encrypted with a KMS key: then its ETag is not a digest."""
    return str(headers.get("x-amz-server-side-encryption", "")).startswith("aws:kms")


def _finish(futures: "Iterable[Future[T]]", stop: threading.Event) -> list[T]:
    """The results of all transfers. If one fails, cancels the others and raises its error."""
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
