"""An S3 client that is configured from the settings, and small objects."""

import contextlib
import io
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from forge.core.settings import Settings
from forge.storage import s3_requests
from forge.storage.s3_credentials import find_credentials
from forge.storage.s3_errors import SERVER_BUSY, code_of, retry, translate_s3_errors

if TYPE_CHECKING:
    from minio import Minio
    from urllib3 import PoolManager

S3 = "s3://"
CONNECTIONS = 8
CONNECT = 5  # seconds to connect and to send a request
SENDING = 60  # seconds to connect and to send a request that uploads data
READ = 20  # seconds to wait for the server's next bytes
RETRIES = 6  # of a request; the waits between them double, up to 5 seconds
JSON = {"Content-Type": "application/json"}
CONFLICT = ("PreconditionFailed", "ConditionalRequestConflict")  # codes: the condition of a write does not hold
NO_CONDITIONS = ("NotImplemented", "MethodNotAllowed")  # codes of a server that refuses the condition's header


@contextlib.contextmanager
def connect(where: str, settings: Settings, sending: float = CONNECT) -> Iterator["Minio"]:
    """A client of the S3 server in the settings. Whatever the client raises becomes a ForgeError at `where`.

    `sending` is the time in seconds in which a request must be sent, including the connection. Uploads need more.
    """
    from minio import Minio

    credentials = find_credentials(where, settings)
    with translate_s3_errors(where, settings.s3_endpoint):
        url = urlsplit(settings.s3_endpoint)
        client = Minio(
            url.netloc,
            secure=url.scheme == "https",
            region=settings.s3_region,
            http_client=_http_pool(sending),
            credentials=credentials,
        )
        if settings.s3_virtual_host:
            client.enable_virtual_style_endpoint()
        yield client


def _http_pool(sending: float) -> "PoolManager":
    """Connections that give up sooner than the client's own, which would wait half an hour for an absent server."""
    from urllib3 import PoolManager, Retry, Timeout

    return PoolManager(
        maxsize=CONNECTIONS,
        timeout=Timeout(connect=sending, read=READ),  # urllib3 applies the connect timeout to sending, too
        retries=Retry(
            total=RETRIES,
            connect=2,
            other=2,  # TLS errors, which an untrusted certificate causes every time
            backoff_factor=0.1,
            backoff_jitter=0.1,
            backoff_max=5,
            status_forcelist=SERVER_BUSY,
            allowed_methods=None,  # S3's POST requests can be repeated, too
        ),
    )


def split(source: str) -> tuple[str, str]:
    """The bucket and the key or prefix of an S3 URI."""
    bucket, _, key = source.removeprefix(S3).partition("/")
    return bucket, key


def exists(client: "Minio", bucket: str, name: str) -> bool:
    """Whether an object exists."""
    from minio.error import S3Error

    try:
        client.stat_object(bucket, name)
    except S3Error as error:
        if error.code == "NoSuchKey":
            return False
        raise
    return True


def read_object(client: "Minio", bucket: str, name: str) -> bytes | None:
    """A small object, or None if it does not exist."""
    found = read_with_etag(client, bucket, name)
    return None if found is None else found[0]


def read_with_etag(client: "Minio", bucket: str, name: str) -> tuple[bytes, str] | None:
    """A small object and its ETag, or None if it does not exist."""
    from minio.error import MinioException

    try:
        return _get(client, bucket, name)
    except MinioException as error:
        if code_of(error) == "NoSuchKey":
            return None
        raise


@retry.wraps
def _get(client: "Minio", bucket: str, name: str) -> tuple[bytes, str]:
    response = client.get_object(bucket, name)
    try:
        return response.read(), response.headers.get("ETag", "").strip('"')
    finally:
        response.close()
        response.release_conn()


def put_object(client: "Minio", bucket: str, name: str, data: bytes) -> None:
    """Write a small object, replacing the old one."""
    client.put_object(bucket, name, io.BytesIO(data), len(data))


def put_if_absent(client: "Minio", bucket: str, name: str, data: bytes) -> bool:
    """Write a small object; False if another one exists.

    One of several concurrent writers wins if the server honours If-None-Match (MinIO, AWS and Ceph do). On others the
    last one wins, so writers must read the object afterwards.
    """
    return not exists(client, bucket, name) and put_if_unchanged(client, bucket, name, data, "")


def put_if_unchanged(client: "Minio", bucket: str, name: str, data: bytes, etag: str) -> bool:
    """Replace the version of a small object with this ETag ("": create it); False if it has changed.

    Servers that ignore conditions always write; see `honours_conditions`.
    """
    from minio.error import MinioException

    condition = {"If-Match": f'"{etag}"'} if etag else {"If-None-Match": "*"}
    try:
        s3_requests.put(client, bucket, name, data, JSON | condition)
    except MinioException as error:
        if code_of(error) in CONFLICT or (etag and code_of(error) == "NoSuchKey"):
            # A retried request conflicts with itself if the answer to the first was lost.
            return read_object(client, bucket, name) == data
        raise
    return True


def honours_conditions(client: "Minio", bucket: str, probe: str) -> bool:
    """Whether the server refuses a write whose condition does not hold. Tried on an object that is then deleted."""
    from minio.error import MinioException

    put_object(client, bucket, probe, b"probe")
    try:
        for etag in ("", "0" * 32):  # If-None-Match, If-Match
            if put_if_unchanged(client, bucket, probe, b"written against its condition", etag):
                return False
    except MinioException as error:
        if code_of(error) in NO_CONDITIONS:
            return False
        raise
    finally:
        client.remove_object(bucket, probe)
    return True


def abort_stale_uploads(client: "Minio", bucket: str, prefix: str, older_than: timedelta) -> int:
    """Abort multipart uploads under a prefix that began longer ago; returns their number.

    Processes that were killed leave them, and they take up space that no listing of objects shows.
    """
    from minio.error import MinioException

    aborted = 0
    try:
        for upload in s3_requests.unfinished_uploads(client, bucket, prefix):
            began = upload.initiated_time
            if began is None or datetime.now(UTC) - began >= older_than:
                _abort(client, bucket, upload.object_name, upload.upload_id or "")
                aborted += 1
    except MinioException as error:
        if code_of(error) != "NoSuchUpload":  # rclone's answer if there are none
            raise
    return aborted


def _abort(client: "Minio", bucket: str, name: str, upload_id: str) -> None:
    from minio.error import MinioException

    try:
        s3_requests.abort_upload(client, bucket, name, upload_id)
    except MinioException as error:
        if code_of(error) != "NoSuchUpload":  # another process has aborted or completed it
            raise
