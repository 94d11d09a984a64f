"""S3, by the minio client: connected with the settings, its errors told as ours, files moved whole or not at all."""

import contextlib
import functools
import hashlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from tasks.errors import ForgeError
from tasks.settings import Settings

if TYPE_CHECKING:
    from minio import Minio

S3 = "s3://"
CONNECTIONS = 8
ATTEMPTS = 3  # for a transfer that breaks off or arrives damaged; the clients retry requests that fail themselves
CHUNK = 1 << 20  # bytes
CONNECT = 5  # seconds
PART = 16 << 20  # bytes of a file that are sent at once; of the sizes tried the fastest
SENDING = 60  # seconds that a part may take
MD5 = re.compile("[0-9a-f]{32}")


class File(NamedTuple):
    """A file at a source: its key or path there, its bytes, and in S3 its etag."""

    name: str
    size: int
    etag: str = ""


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
        raise _answered(what, endpoint, error.code or "", error.message or "") from None
    except HTTPError as error:
        reason = getattr(error, "reason", None) or error
        raise ForgeError(
            f"{what}: {endpoint} cannot be read ({reason}); check FORGE_S3_ENDPOINT and the network"
        ) from None
    except (MinioException, SyntaxError) as error:  # ElementTree's errors are SyntaxErrors
        if found := re.search("<Code>([^<]+)</Code>", str(error)):  # the client takes no XML that is called text
            raise _answered(what, endpoint, found.group(1), "") from None
        raise ForgeError(
            f"{what}: {endpoint} does not answer as S3 does; give FORGE_S3_ENDPOINT the port of its S3 API"
        ) from None
    except ValueError as error:
        raise ForgeError(f"{what}: {error}; mend the name, or FORGE_S3_ENDPOINT or FORGE_S3_REGION") from None
    except OSError as error:
        raise ForgeError(f"{what}: cannot be written here ({error}); free space, or set FORGE_HOME") from None


def _answered(what: str, endpoint: str, code: str, message: str) -> ForgeError:
    mends = {
        "NoSuchBucket": "check the bucket's name and FORGE_S3_ENDPOINT",
        "NoSuchKey": "an object was removed meanwhile; run again",
        "PermanentRedirect": "check FORGE_S3_REGION",
        "AuthorizationHeaderMalformed": "check FORGE_S3_REGION",
    }
    mend = mends.get(code, "check FORGE_S3_ACCESS_KEY, FORGE_S3_SECRET_KEY and what they may do")
    return ForgeError(f"{what}: {endpoint} answers {code}{f' ({message})' if message else ''}; {mend}")


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
            raise ForgeError(f"{S3}{bucket}/{file.name}: changed while it was being read; run again")
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


def upload(client: "Minio", bucket: str, path: Path, name: str, sha256: str) -> None:
    """Send a file, and make sure that what arrived is what was sent.

    The server's etag says so where it is the usual digest of what arrived; where it is another, the file is read back.
    """
    from minio.error import S3Error
    from urllib3.exceptions import HTTPError, ProtocolError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            written = client.fput_object(bucket, name, str(path), part_size=PART)
            if not is_etag_of(path, written.etag or "") and _digest_there(client, bucket, name) != sha256:
                raise ProtocolError(f"{name} arrived damaged {ATTEMPTS} times")
        except (S3Error, HTTPError) as error:
            passing = not isinstance(error, S3Error) or error.response.status >= 500
            if attempt == ATTEMPTS or not passing:
                raise
        else:
            return


def is_etag_of(path: Path, etag: str) -> bool:
    """Whether a server's etag is the usual digest of a file: its MD5, or that of the MD5s of its parts of PART bytes.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    with path.open("rb") as file:
        if "-" not in etag:
            return hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest() == etag
        parts = [hashlib.md5(part, usedforsecurity=False).digest() for part in iter(lambda: file.read(PART), b"")]
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}" == etag


def _digest_there(client: "Minio", bucket: str, name: str) -> str:
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


def put_if_absent(client: "Minio", bucket: str, name: str, data: bytes) -> bool:
    """Write a small object; False where there is one already.

    Of racing writers one wins where the server knows If-None-Match (MinIO, AWS, Ceph). Others ignore it, so that the
    last one wins: they are looked at first, and afterwards.
    """
    from minio.error import S3Error

    if exists(client, bucket, name):
        return False
    headers: dict[str, str | list[str] | tuple[str]] = {"If-None-Match": "*", "Content-Type": "application/json"}
    try:
        client._put_object(bucket, name, data, headers)  # the public methods take no such header
    except S3Error as error:
        if error.code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return False
        raise
    return True


def exists(client: "Minio", bucket: str, name: str) -> bool:
    """Whether there is an object."""
    from minio.error import S3Error

    try:
        client.stat_object(bucket, name)
    except S3Error as error:
        if error.code == "NoSuchKey":
            return False
        raise
    return True


def read(client: "Minio", bucket: str, name: str) -> bytes | None:
    """A small object, or None where there is none."""
    from minio.error import MinioException

    if not exists(client, bucket, name):
        return None
    try:
        response = client.get_object(bucket, name)
    except MinioException as error:
        if "NoSuchKey" in str(error):  # removed meanwhile
            return None
        raise
    try:
        return response.read()
    finally:
        response.close()
        response.release_conn()
