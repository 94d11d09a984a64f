"""Signatures of packages by OpenSSF model-signing: created with FORGE_SIGNING_KEY, verified with FORGE_VERIFY_KEY.

`model_signing verify key DIR --signature DIR/model.sig --public_key KEY.pub` verifies one by hand.
https://github.com/sigstore/model-transparency
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.storage.manifest import SIGNATURE

if TYPE_CHECKING:
    from model_signing.hashing import Config


def sign(directory: Path, settings: Settings) -> None:
    """Sign the files of a directory if FORGE_SIGNING_KEY is set; raises ForgeError if that is not a usable key."""
    if settings.signing_key is None:
        return
    from model_signing.signing import Config

    try:
        signing = Config().set_hashing_config(_hashing(directory))
        signing.use_elliptic_key_signer(private_key=settings.signing_key).sign(directory, directory / SIGNATURE)
    except (OSError, ValueError, TypeError) as error:
        raise ForgeError(
            f"cannot be used to sign ({_first(error)})",
            where=f"FORGE_SIGNING_KEY {settings.signing_key}",
            fix="set it to the path of an elliptic-curve private key in PEM format without a password",
        ) from None


def check_signature(directory: Path, signature: bytes | None, settings: Settings) -> None:
    """Raise ForgeError if FORGE_VERIFY_KEY is set and the signature is not one of that key over these files."""
    if settings.verify_key is None:
        return
    from model_signing.verifying import Config

    if signature is None:
        raise ForgeError(
            "is not signed", where=f"package {directory}", fix="register its model again with FORGE_SIGNING_KEY set"
        )
    try:
        verifying = Config().set_hashing_config(_hashing(directory))
        verifying.use_elliptic_key_verifier(public_key=settings.verify_key)
    except (OSError, ValueError, TypeError) as error:
        raise ForgeError(
            f"is not a key ({_first(error)})",
            where=f"FORGE_VERIFY_KEY {settings.verify_key}",
            fix="set it to the path of a public key in PEM format",
        ) from None
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(signature)
            file.flush()
            verifying.verify(directory, Path(file.name))
    except Exception as error:  # a malformed signature may raise anything
        raise ForgeError(
            f"its signature {SIGNATURE} is not one of FORGE_VERIFY_KEY {settings.verify_key} over these files "
            f"({_first(error)})",
            where=f"package {directory}",
            fix="do not use it, and find out who wrote it",
        ) from None


def check_keys(settings: Settings) -> None:
    """Raise ForgeError unless a signature of the signing key can be verified. Checked before anything expensive."""
    if settings.signing_key is None:
        return
    if settings.verify_key is None:
        raise ForgeError(
            "FORGE_SIGNING_KEY is set without FORGE_VERIFY_KEY", fix="set that to the path of its public key"
        )
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "file").write_text("signed", encoding="utf-8")
        sign(Path(directory), settings)
        check_signature(Path(directory), (Path(directory) / SIGNATURE).read_bytes(), settings)


def _hashing(directory: Path) -> "Config":
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=[directory / SIGNATURE])


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
