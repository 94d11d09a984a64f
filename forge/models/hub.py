"""Models of the Hugging Face Hub: their files, configuration and size. All downloads of models are here.

Only safetensors are downloaded, never pickled weights. The client is imported when needed, since most models are local.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.core.errors import ForgeError
from forge.core.full_disk import explain_full_disk
from forge.registry.packages import LocalBase

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
TIMEOUT = 10  # seconds for the Hub to answer
FIX = "free space there, or set HF_HOME to a directory on another disk"


def local_directory(model: LocalBase) -> Path:
    """The directory of a model's files. Downloads a model of the Hub; raises ForgeError if it is not available."""
    directory = Path(model.location)
    return directory if directory.is_dir() else download_model(model.location, model.revision)


def download_model(name: str, revision: str) -> Path:
    """The directory of a model of the Hub, downloaded to the local cache if need be ("": the latest revision)."""
    with explain_full_disk(_cache(), f"base model {name}", fix=FIX), _translate_hub_errors(name):
        return Path(_api().snapshot_download(name, revision=revision or None, allow_patterns=FILES))


def model_config(model: LocalBase) -> dict[str, Any]:
    """The config.json of a local model, or of a model of the Hub."""
    path = Path(model.location) / CONFIG
    if not path.is_file():
        with _translate_hub_errors(model.location):
            revision = model.revision or None
            path = Path(_api().hf_hub_download(model.location, CONFIG, revision=revision, etag_timeout=TIMEOUT))
    return parse_config(path.read_bytes(), model.location)


def parse_config(data: bytes, name: str, file: str = CONFIG) -> dict[str, Any]:
    """The content of a model's config.json, or of another file; raises ForgeError if it is not a JSON object."""
    try:
        config = json.loads(data)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ForgeError(
            f"its {file} is not a JSON object", where=f"base model {name}", fix="save it with save_pretrained"
        )
    return config


def cached_config(name: str, revision: str | None) -> Path | None:
    """The config.json of a model of the Hub if it is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    with _translate_hub_errors(name):
        path = try_to_load_from_cache(name, CONFIG, revision=revision)
        return Path(path) if isinstance(path, str) else None


def pin_revision(name: str, revision: str | None) -> str:
    """The commit of a revision (None: the latest). The Hub is not asked about a revision in the local cache."""
    if revision and cached_config(name, revision):
        return revision
    with _translate_hub_errors(name):
        return str(_api().model_info(name, revision=revision, timeout=TIMEOUT).sha)


def weight_bytes(name: str, revision: str) -> int:
    """The size of a model's safetensors on the Hub, which are not downloaded."""
    with _translate_hub_errors(name):
        found = _api().model_info(name, revision=revision or None, files_metadata=True, timeout=TIMEOUT)
        files = found.siblings or []
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))


def _cache() -> Path:
    """Where the client keeps the files of models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    # The client itself reads HF_ENDPOINT only when it is imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


@contextlib.contextmanager
def _translate_hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client raises errors of its HTTP library as well as its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ForgeError(
            f"is neither a directory here nor available from the Hub ({reason})",
            where=f"base model {name}",
            fix=(
                "check its name, the network and HF_TOKEN (gated models need it), or give a directory in Hugging Face "
                "format or models:/name@champion"
            ),
        ) from None


def check_unquantised(config: dict[str, Any], where: str) -> None:
    """Raise ForgeError if a model's config.json says that its weights are quantised already: they cannot be trained."""
    if quantisation := config.get("quantization_config"):
        raise ForgeError(
            f"its weights are quantised already ({quantisation.get('quant_method', 'unknown method')})",
            where=where,
            fix="name the original model; training.method qlora quantises it to 4 bits",
        )


def generation_ends(directory: Path, config: dict[str, Any]) -> set[int]:
    """The end tokens at which servers stop: those of a model's generation config, or without one of its config.json."""
    path = directory / GENERATION_CONFIG
    found = parse_config(path.read_bytes(), str(directory), GENERATION_CONFIG) if path.exists() else config
    ends = found.get("eos_token_id")
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def weight_files(directory: Path) -> list[Path]:
    """The files of a model's weights: those that its index names, or without one all safetensors."""
    index = directory / INDEX
    if not index.exists():
        return sorted(directory.glob("*.safetensors"))
    names = parse_config(index.read_bytes(), str(directory), INDEX).get("weight_map", {}).values()
    return sorted(directory / name for name in set(names))
