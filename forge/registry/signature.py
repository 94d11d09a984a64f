"""Signatures of packages, by OpenSSF model-signing: made where a private key is set, asked for by every reader.

`model_signing verify key DIR --signature DIR/model.sig --public_key KEY.pub` does the same by hand.
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
    """Write the signature of a directory's files, where FORGE_SIGNING_KEY is set; ForgeError where that is no key."""
    if settings.signing_key is None:
        return
    from model_signing.signing import Config

    try:
        signing = Config().set_hashing_config(_hashing(directory))
        signing.use_elliptic_key_signer(private_key=settings.signing_key).sign(directory, directory / SIGNATURE)
    except (OSError, ValueError, TypeError) as error:
        raise ForgeError(
            f"FORGE_SIGNING_KEY {settings.signing_key}: cannot sign with it ({_first(error)}); give the path of an "
            "elliptic curve's private key in PEM, without a password"
        ) from None


def check_signature(directory: Path, signature: bytes | None, settings: Settings) -> None:
    """ForgeError unless a directory is signed as it is, where FORGE_VERIFY_KEY is set."""
    if settings.verify_key is None:
        return
    from model_signing.verifying import Config

    if signature is None:
        raise ForgeError(f"package {directory}: is not signed; register its model again, with FORGE_SIGNING_KEY set")
    try:
        verifying = Config().set_hashing_config(_hashing(directory))
        verifying.use_elliptic_key_verifier(public_key=settings.verify_key)
    except (OSError, ValueError, TypeError) as error:
        raise ForgeError(
            f"FORGE_VERIFY_KEY {settings.verify_key}: is no key ({_first(error)}); give the path of a public key in PEM"
        ) from None
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(signature)
            file.flush()
            verifying.verify(directory, Path(file.name))
    except Exception as error:  # a broken signature raises whatever its parts do
        raise ForgeError(
            f"package {directory}: its signature {SIGNATURE} is not one of FORGE_VERIFY_KEY {settings.verify_key} over "
            f"these files ({_first(error)}); do not use it, and see who wrote it"
        ) from None


def check_keys(settings: Settings) -> None:
    """ForgeError unless what is signed here can be verified here: looked at before anything costly."""
    if settings.signing_key is None:
        return
    if settings.verify_key is None:
        raise ForgeError("FORGE_SIGNING_KEY is set without FORGE_VERIFY_KEY; set that to the path of its public key")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "file").write_text("signed")
        sign(Path(directory), settings)
        check_signature(Path(directory), (Path(directory) / SIGNATURE).read_bytes(), settings)


def _hashing(directory: Path) -> "Config":
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=[directory / SIGNATURE])


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
