"""The S3 keys: from FORGE_S3_ACCESS_KEY and FORGE_S3_SECRET_KEY, else from the AWS variables or credentials file."""

import configparser
import re
from typing import TYPE_CHECKING

from forge.core.errors import ForgeError
from forge.core.settings import Settings

if TYPE_CHECKING:
    from minio.credentials import Provider


def find_credentials(where: str, settings: Settings) -> "Provider":
    """A provider of the S3 keys. Raises ForgeError, without any key in it, if something is missing or malformed."""
    in_settings = settings.s3_access_key.get_secret_value() or settings.s3_secret_key.get_secret_value()
    provider = _from_settings(settings) if in_settings else _from_aws(where)
    missing = [] if settings.s3_endpoint else ["FORGE_S3_ENDPOINT"]
    if provider is None:
        keys = {"FORGE_S3_ACCESS_KEY": settings.s3_access_key, "FORGE_S3_SECRET_KEY": settings.s3_secret_key}
        missing += [name for name, key in keys.items() if not key.get_secret_value()]
    if missing or provider is None:
        raise ForgeError(
            "S3 needs a server and credentials",
            where=where,
            fix=f"set {', '.join(missing)} (or the AWS variables for the keys)",
        )
    _check_characters(where, provider)
    return provider


def _from_settings(settings: Settings) -> "Provider | None":
    """Both keys of the settings. A single key is never completed from the AWS variables."""
    from minio.credentials import StaticProvider

    access_key, secret_key = settings.s3_access_key.get_secret_value(), settings.s3_secret_key.get_secret_value()
    return StaticProvider(access_key, secret_key) if access_key and secret_key else None


def _from_aws(where: str) -> "Provider | None":
    """The AWS variables, else the AWS credentials file."""
    from minio.credentials import AWSConfigProvider, ChainedProvider, EnvAWSProvider

    provider = ChainedProvider([EnvAWSProvider(), AWSConfigProvider()])
    try:
        provider.retrieve()
    except configparser.Error as error:  # its message quotes lines of the file
        raise ForgeError(
            f"the AWS credentials file cannot be read ({type(error).__name__}; write % as %%)",
            where=where,
            fix="correct AWS_SHARED_CREDENTIALS_FILE, or set FORGE_S3_ACCESS_KEY and FORGE_S3_SECRET_KEY",
        ) from None
    except ValueError:
        return None
    return provider


def _check_characters(where: str, provider: "Provider") -> None:
    keys = provider.retrieve()
    if not all(re.fullmatch("[!-~]*", key) for key in (keys.access_key, keys.secret_key, keys.session_token or "")):
        raise ForgeError(
            "an S3 key contains a space, a line break or another character that keys never contain",
            where=where,
            fix="correct FORGE_S3_ACCESS_KEY and FORGE_S3_SECRET_KEY, or the AWS variables",
        )
