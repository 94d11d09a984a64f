"""Errors of the minio client and its HTTP library: which are transient, what their S3 code is, and as ForgeErrors."""

import contextlib
import re
from collections.abc import Iterator

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from forge.core.errors import ForgeError

ATTEMPTS = 4  # at a transfer that is interrupted or arrives damaged; the client itself retries failed requests
SERVER_BUSY = (500, 502, 503, 504)
TRANSIENT = {"BadDigest", "IncompleteBody", "NoSuchUpload", "RequestTimeout", "XAmzContentSHA256Mismatch"}  # S3 codes

_DAMAGED = "the data arrived damaged several times: check the network, and run again"
_FIXES = {
    "NoSuchBucket": "check the bucket's name and FORGE_S3_ENDPOINT",
    "NoSuchKey": "the object has just been deleted; run again",
    "PermanentRedirect": "check FORGE_S3_REGION",
    "AuthorizationHeaderMalformed": "check FORGE_S3_REGION",
    "BadDigest": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
}


class Damaged(Exception):
    """An object's bytes are not the bytes that were sent. The argument is the object's name."""


def code_of(error: BaseException) -> str:
    """The S3 error code of a client error, or ""."""
    from minio.error import MinioException, S3Error

    if isinstance(error, S3Error):
        return str(error.code or "")
    if isinstance(error, MinioException):
        # rclone sends errors as text/xml. The client parses application/xml only, but quotes the body.
        found = re.search("<Code>([^<]+)</Code>", str(error))
        return found.group(1) if found else ""
    return ""


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    from minio.error import MinioException, S3Error, ServerError
    from urllib3.exceptions import HTTPError, MaxRetryError

    if isinstance(error, MaxRetryError):  # the client has retried it already
        return False
    if isinstance(error, S3Error):
        return error.response.status in SERVER_BUSY or error.code in TRANSIENT
    if isinstance(error, ServerError):
        return error.status_code in SERVER_BUSY
    if isinstance(error, MinioException):
        return code_of(error) in TRANSIENT | {""}
    return isinstance(error, HTTPError | Damaged)


# Calls a function, and again after transient errors. The random waits keep parallel transfers from retrying in step.
retry = Retrying(
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_random_exponential(multiplier=0.2, max=5),
    retry=retry_if_exception(is_transient),
    reraise=True,
)


@contextlib.contextmanager
def translate_s3_errors(where: str, endpoint: str) -> Iterator[None]:
    """Turn all that the client raises into a ForgeError."""
    from minio.error import MinioException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except HTTPError as error:
        raise _unreachable(error, where, endpoint) from None
    except Damaged as error:
        raise ForgeError(
            f"{error} arrived damaged several times",
            where=where,
            fix="check the network and the server's disks, and run again",
        ) from None
    except (MinioException, SyntaxError) as error:  # ElementTree's ParseError is a SyntaxError
        raise _refused(error, where, endpoint) from None
    except ValueError as error:
        raise ForgeError(
            str(error), where=where, fix="correct the name, or FORGE_S3_ENDPOINT or FORGE_S3_REGION"
        ) from None
    except OSError as error:
        raise ForgeError(
            f"a local file cannot be written ({error})", where=where, fix="free space, or set FORGE_HOME"
        ) from None


def _unreachable(error: Exception, where: str, endpoint: str) -> ForgeError:
    reason = getattr(error, "reason", None) or error
    untrusted = "CERTIFICATE_VERIFY_FAILED" in str(reason)
    fix = "set SSL_CERT_FILE to the file of its certificate" if untrusted else "check FORGE_S3_ENDPOINT and the network"
    return ForgeError(f"{endpoint} cannot be read ({reason})", where=where, fix=fix)


def _refused(error: Exception, where: str, endpoint: str) -> ForgeError:
    code = code_of(error)
    if not code:
        return ForgeError(
            f"{endpoint} does not answer like an S3 server",
            where=where,
            fix="set FORGE_S3_ENDPOINT to the port of its S3 API",
        )
    message = getattr(error, "message", "")
    fix = _FIXES.get(code, "check FORGE_S3_ACCESS_KEY, FORGE_S3_SECRET_KEY and the user's permissions")
    return ForgeError(f"{endpoint} answers {code}{f' ({message})' if message else ''}", where=where, fix=fix)
