"""The files of a model to serve: downloaded, or only their size."""

from pathlib import Path
from typing import Any

from forge.core.digest import digest_model
from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.models.hub import download_model, model_config, parse_config, weight_bytes
from forge.registry.packages import LocalBase, open_package
from forge.serving.desired import Served
from forge.storage import Store


def fetch_served(served: Served, settings: Settings, store: Store) -> Path:
    """The local directory of a model to serve: a verified package, a directory, or a model of the Hub.

    Raises ForgeError if it is not available.
    """
    if served.directory:
        check_directory(served.directory)
        if digest_model(served.directory) != served.digest:
            raise ForgeError(
                "was changed since its adapter was trained on it",
                where=f"base model {served.directory}",
                fix="restore the directory",
            )
        return served.directory
    if "://" in served.uri:
        return open_package(served.uri, served.digest, settings, store)[0]
    return download_model(served.uri, served.digest)


def base_config_and_size(base: Served, store: Store) -> tuple[dict[str, Any], int]:
    """The config.json of a base model and the bytes of its weights, which are not downloaded.

    Raises ForgeError if the model is not available.
    """
    if base.directory:
        check_directory(base.directory)
        sizes = [path.stat().st_size for path in base.directory.glob("*.safetensors")]
        return model_config(LocalBase(str(base.directory))), sum(sizes)
    if "://" in base.uri:
        entries = store.manifest(base.uri)["files"]
        config = store.read("/".join([*base.uri.split("/")[-3:], "config.json"])) or b"{}"
        sizes = [entry["size"] for entry in entries if entry["path"].endswith(".safetensors")]
        return parse_config(config, base.uri), sum(sizes)
    return model_config(LocalBase(base.uri, base.digest)), weight_bytes(base.uri, base.digest)


def check_directory(directory: Path) -> None:
    """Raise ForgeError if a directory no longer contains a model."""
    if not (directory / "config.json").is_file():
        raise ForgeError("its config.json is missing", where=f"base model {directory}", fix="restore the directory")
