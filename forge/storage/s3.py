"""S3, by the minio client: connected with the settings, its errors told as ours, and small objects."""

import configparser
import contextlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from forge.core.errors import ForgeError
from forge.core.settings import Settings

if TYPE_CHECKING:
    from minio import Minio
    from minio.credentials import Provider

S3 = "s3://"
CONNECTIONS = 8
CONNECT = 5  # seconds
RETRIES = 6  # of a request; the waits between them double up to 5 seconds
PASSING = (500, 502, 503, 504)
READ = 20  # seconds until the server says something, or something more
SENDING = 60  # seconds that a part may take


class Damaged(Exception):
    """An object's bytes are not those that were sent, however often they were; its argument is the object's name."""


@contextlib.contextmanager
def connect(what: str, settings: Settings, sending: float = CONNECT) -> Iterator["Minio"]:
    """A client of the S3 server that the settings name; what it raises becomes a ForgeError about `what`.

    `sending` is in how many seconds a request must be sent, connecting included: whoever uploads wants more of them.
    """
    from minio import Minio
    from minio.error import MinioException, S3Error
    from urllib3 import PoolManager, Retry, Timeout
    from urllib3.exceptions import HTTPError

    endpoint, credentials = settings.s3_endpoint, _credentials(settings)
    if not endpoint or credentials is None:
        given = {
            "FORGE_S3_ENDPOINT": endpoint,
            "FORGE_S3_ACCESS_KEY": credentials or settings.s3_access_key.get_secret_value(),
            "FORGE_S3_SECRET_KEY": credentials or settings.s3_secret_key.get_secret_value(),
        }
        missing = ", ".join(name for name, value in given.items() if not value)
        raise ForgeError(f"{what}: S3 needs a server and credentials; set {missing} (or AWS's variables for the keys)")
    keys = credentials.retrieve()
    if not all(re.fullmatch("[!-~]*", key) for key in (keys.access_key, keys.secret_key, keys.session_token or "")):
        raise ForgeError(
            f"{what}: a key of S3 holds a space, a line's end or another character that no key has; mend "
            "FORGE_S3_ACCESS_KEY and FORGE_S3_SECRET_KEY, or AWS's variables"
        )
    url = urlsplit(endpoint)
    # The client's own limits, five minutes and five retries, would wait half an hour for a server that is not there.
    http = PoolManager(
        maxsize=CONNECTIONS,
        timeout=Timeout(connect=sending, read=READ),  # urllib3 sends under the limit to connect
        retries=Retry(
            total=RETRIES,
            connect=2,
            other=2,  # TLS errors: a certificate that is not trusted will not be
            backoff_factor=0.1,
            backoff_jitter=0.1,
            backoff_max=5,
            status_forcelist=PASSING,
            allowed_methods=None,  # S3's POSTs may be repeated too
        ),
    )
    try:
        client = Minio(
            url.netloc,
            secure=url.scheme == "https",
            region=settings.s3_region,
            http_client=http,
            credentials=credentials,
        )
        if settings.s3_virtual_host:
            client.enable_virtual_style_endpoint()
        yield client
    except S3Error as error:
        raise _answered(what, endpoint, error.code or "", error.message or "") from None
    except HTTPError as error:
        reason = getattr(error, "reason", None) or error
        trust = "CERTIFICATE_VERIFY_FAILED" in str(reason)
        mend = "name its certificate's file in SSL_CERT_FILE" if trust else "check FORGE_S3_ENDPOINT and the network"
        raise ForgeError(f"{what}: {endpoint} cannot be read ({reason}); {mend}") from None
    except Damaged as error:
        raise ForgeError(
            f"{what}: {error} arrived damaged again and again; see the network and the server's disks, and run again"
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
    arrived = "what was sent arrived damaged again and again; see the network, and run again"
    mends = {
        "BadDigest": arrived,
        "XAmzContentSHA256Mismatch": arrived,
        "NoSuchBucket": "check the bucket's name and FORGE_S3_ENDPOINT",
        "NoSuchKey": "an object was removed meanwhile; run again",
        "PermanentRedirect": "check FORGE_S3_REGION",
        "AuthorizationHeaderMalformed": "check FORGE_S3_REGION",
    }
    mend = mends.get(code, "check FORGE_S3_ACCESS_KEY, FORGE_S3_SECRET_KEY and what they may do")
    return ForgeError(f"{what}: {endpoint} answers {code}{f' ({message})' if message else ''}; {mend}")


def _credentials(settings: Settings) -> "Provider | None":
    """Where the keys come from: the settings, or else the usual AWS variables, or else the AWS credentials file."""
    from minio.credentials import AWSConfigProvider, ChainedProvider, EnvAWSProvider, StaticProvider

    access_key, secret_key = settings.s3_access_key.get_secret_value(), settings.s3_secret_key.get_secret_value()
    if access_key or secret_key:
        return StaticProvider(access_key, secret_key) if access_key and secret_key else None
    found = ChainedProvider([EnvAWSProvider(), AWSConfigProvider()])
    try:
        found.retrieve()
    except configparser.Error as error:  # its message shows lines of the file
        raise ForgeError(
            f"the AWS credentials file cannot be read ({type(error).__name__}; a % in it is written %%); mend "
            "AWS_SHARED_CREDENTIALS_FILE, or set FORGE_S3_ACCESS_KEY and FORGE_S3_SECRET_KEY"
        ) from None
    except ValueError:
        return None
    return found


def split(source: str) -> tuple[str, str]:
    """The bucket and the key or prefix of an S3 URI."""
    bucket, _, key = source.removeprefix(S3).partition("/")
    return bucket, key


def put_if_absent(client: "Minio", bucket: str, name: str, data: bytes) -> bool:
    """Write a small object; False where there is another one already.

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
            return read_object(client, bucket, name) == data  # ours, where the answer to an earlier request was lost
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


def read_object(client: "Minio", bucket: str, name: str) -> bytes | None:
    """A small object, or None where there is none."""
    from minio.error import MinioException

    if not exists(client, bucket, name):
        return None
    try:
        # Unlike get_object's, its body is read where the client repeats what breaks off.
        return bytes(client._execute("GET", bucket, name).data)
    except MinioException as error:
        if "NoSuchKey" in str(error):  # removed meanwhile
            return None
        raise


def abort_stale_uploads(client: "Minio", bucket: str, prefix: str, older_than: timedelta) -> int:
    """Abort uploads in parts under a prefix that were begun before so long, and return how many.

    A process that was killed leaves them, and they take room that no listing shows.
    """
    from minio.error import MinioException

    swept, key, upload_id = 0, "", ""
    while True:
        try:  # no public method tells of them
            found = client._list_multipart_uploads(bucket, prefix=prefix, key_marker=key, upload_id_marker=upload_id)
        except MinioException as error:
            if "NoSuchUpload" in str(error):  # rclone's way to say that there are none
                return swept
            raise
        for upload in found.uploads:
            begun = upload.initiated_time
            if begun is None or datetime.now(UTC) - begun >= older_than:
                try:
                    client._abort_multipart_upload(bucket, upload.object_name, upload.upload_id or "")
                except MinioException as error:
                    if "NoSuchUpload" not in str(error):  # aborted or completed meanwhile
                        raise
                swept += 1
        key, upload_id = found.next_key_marker or "", found.next_upload_id_marker or ""
        if not found.is_truncated or not key:
            return swept
