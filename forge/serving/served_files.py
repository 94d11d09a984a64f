"""What is to be served, where it is kept: fetched whole, or only asked how large it is."""

import json
from pathlib import Path
from typing import Any

from forge.core.digest import digest_directory
from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.packages import open_package
from forge.serving.desired import Served
from forge.storage import Store

KINDS = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def fetch_served(one: Served, settings: Settings, store: Store) -> Path:
    """The local directory of something to serve: a verified package, a directory, or a model of the hub.

    ForgeError where it is not there.
    """
    if one.directory:
        check_directory(one.directory)
        if digest_directory(one.directory)[0] != one.digest:
            raise ForgeError(
                f"base model {one.directory}: was changed since its adapter was trained on it; put it back"
            )
        return one.directory
    if "://" in one.uri:
        return open_package(one.uri, one.digest, settings, store)[0]
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(one.uri, revision=one.digest, allow_patterns=KINDS))
    except Exception as error:  # the client raises its HTTP library's errors as well as its own
        raise _not_to_be_had(one, error) from None


def base_config_and_size(base: Served, store: Store) -> tuple[dict[str, Any], int]:
    """A base's config.json and the bytes of its weights, without fetching them; ForgeError where it is not there."""
    if base.directory:
        check_directory(base.directory)
        sizes = [path.stat().st_size for path in base.directory.glob("*.safetensors")]
        return json.loads((base.directory / "config.json").read_bytes()), sum(sizes)
    if "://" in base.uri:
        entries = store.manifest(base.uri)["files"]
        config = store.read("/".join([*base.uri.split("/")[-3:], "config.json"])) or b"{}"
        sizes = [entry["size"] for entry in entries if entry["path"].endswith(".safetensors")]
        return json.loads(config), sum(sizes)
    from huggingface_hub import HfApi, hf_hub_download

    try:
        files = HfApi().model_info(base.uri, revision=base.digest, files_metadata=True, timeout=10).siblings or []
        path = hf_hub_download(base.uri, "config.json", revision=base.digest, etag_timeout=5)
    except Exception as error:  # as in fetch
        raise _not_to_be_had(base, error) from None
    sizes = [file.size or 0 for file in files if file.rfilename.endswith(".safetensors")]
    return json.loads(Path(path).read_bytes()), sum(sizes)


def check_directory(directory: Path) -> None:
    """ForgeError where a directory is no model any more."""
    if not (directory / "config.json").is_file():
        raise ForgeError(f"base model {directory}: there is no config.json any more; put it back")


def _not_to_be_had(one: Served, error: Exception) -> ForgeError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ForgeError(f"base model {one.uri}: not to be had from the hub ({reason}); make it reachable, and run again")
