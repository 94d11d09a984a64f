"""The checks. Each looks at one thing a later stage needs, and says what to do about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from forge.capacity.model_size import architecture_config, measure_model
from forge.capacity.training_memory import check_fit
from forge.cluster.gpus import GPU, on_cluster, training_gpus
from forge.cluster.nodes import check_cluster_has, find_shape
from forge.core.contracts import Base, Source
from forge.core.digest import digest_directory
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe
from forge.core.settings import Settings, load_settings, path_of
from forge.registry.mlflow_registry import find_champion, open_registry
from forge.registry.packages import LocalBase, directory_of, is_registered, local_base, registered_base
from forge.registry.signature import check_keys
from forge.serving.rollout_check import check_rollout
from forge.serving.targets import read_serving
from forge.serving.vllm_environment import NO_VLLM, vllm_release
from forge.serving.vllm_process import LocalServer, port_is_free
from forge.storage import Store, open_store
from forge.storage.recipes import load_recipe
from forge.storage.s3 import connect, split
from tasks.evaluate.champion import find_package
from tasks.evaluate.harness import check_harness
from tasks.preprocess.sample import check_source
from tasks.preprocess.sources import DEMONSTRATION, digest_source, pin

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")


def check_all(data_path: str, recipe: str) -> tuple[Recipe, Source, Base]:
    """Run every check; returns the recipe, the source and the base model, or raises Problems with all that is wrong.

    What the run will use is checked where it will be used: of a cluster, what its settings and its services say.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except Problems as error:
            problems.extend(error.problems)
        except ForgeError as error:
            problems.append(error.message)
        return None

    settings = attempt(load_settings)
    loaded = attempt(lambda: load_recipe(recipe))
    if loaded is not None and settings is not None:
        loaded = settled(loaded, settings)
    data = loaded.data if loaded else DataRecipe(max_seq_len=16)  # rows are checked even where the recipe is wrong
    places_of_rows = {
        "source": absolute(data_path or data.source),
        "heldout_source": absolute(data.heldout_source),
    }
    data = data.model_copy(update=places_of_rows)
    found = attempt(lambda: check_data(data))
    base = store = None
    if settings is not None:
        places = settings
        store = attempt(lambda: writable_store(places))
    if loaded is not None:
        wanted = loaded
        gpus = attempt(lambda: check_training(wanted.training, settings))
        base = attempt(lambda: find_base(wanted.model, settings, store))
        if gpus is not None and base is not None and settings is not None and store is not None:
            here, start, kept = gpus, base, store
            if is_registered(start.location):
                opened: LocalBase | None = LocalBase(str(kept.path(start.location)))  # verified a moment ago
            else:
                opened = attempt(lambda: local_base(start, places, kept))
            if opened is not None:
                config = attempt(lambda: config_of(wanted, opened))
                if config is not None:
                    attempt(lambda: check_memory(wanted, config, here))
                    if wanted.serving.rollout:
                        attempt(lambda: check_rollout(wanted, start, config, read_serving(places), places))
    if settings is not None:
        if store is not None or settings.mlflow_uri:
            client = attempt(lambda: open_registry(places))
            if client is not None and store is not None and loaded is not None:
                registry, kept, name = client, store, loaded.name
                attempt(lambda: check_champion(registry, kept, name))
        rolls_out = places.rollout if loaded is None else bool(loaded.serving.rollout)
        attempt(lambda: check_places(places, rolls_out))
        attempt(lambda: check_copies(places))
        attempt(lambda: check_keys(places))
        if loaded is not None and loaded.evaluation.harness_tasks:
            tasks = loaded.evaluation.harness_tasks
            attempt(lambda: check_harness(tasks, places))
        judged_by_vllm = loaded is not None and loaded.evaluation.engine == "vllm"
        served_here = rolls_out and places.serving_target == "local"
        if judged_by_vllm and on_cluster():
            problems.append("evaluation.engine vllm: the image that evaluates has no vLLM; take auto or transformers")
        elif judged_by_vllm or served_here:
            attempt(lambda: check_vllm(places))
        if served_here:
            attempt(lambda: check_port(places))
    if problems or loaded is None or store is None or found is None or base is None:
        raise Problems("Nothing was started, because:", problems)
    # From here on the recipe names the rows themselves, so that the same rows at another path are the same run.
    data, digest = found
    named = data.model_copy(
        update={"source": f"sha256-{digest}", "heldout_source": "given" * bool(data.heldout_source)}
    )
    model = loaded.model.model_copy(update={"base": base.location or None})
    source = Source(uri=data.source, heldout=data.heldout_source, digest=digest, store=store.identity)
    return loaded.model_copy(update={"data": named, "model": model}), source, base


def settled(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with what the settings of this place decide: the model's name, and whether it is rolled out."""
    rollout = settings.rollout and recipe.serving.rollout is not False
    serving = recipe.serving.model_copy(update={"rollout": rollout})
    return recipe.model_copy(update={"name": f"{recipe.name}{settings.name_suffix}", "serving": serving})


def writable_store(settings: Settings) -> Store:
    """The store, which is made where it is not there yet; ForgeError where it cannot be written."""
    store = open_store(settings)
    _ = store.identity
    return store


def absolute(data_path: str) -> str:
    """A data path as a URI, which means the same in every directory; names that are no local paths stay as they are."""
    if data_path in ("", DEMONSTRATION) or ("://" in data_path and not data_path.startswith("file://")):
        return data_path
    return path_of(data_path).expanduser().absolute().as_uri()


def here_alone(what: str, name: str) -> ForgeError:
    """What is said on a cluster of something that only the pod of preflight would have."""
    return ForgeError(
        f"{what} {name}: is a path, and the pods of a cluster share no disk; copy it to the store and give its s3:// "
        "URI, or a name on the hub"
    )


def check_data(recipe: DataRecipe) -> tuple[DataRecipe, str]:
    """The rows are there, and the first of each file can be used; returns the recipe, pinned, and their digest."""
    for source in (recipe.source, recipe.heldout_source):
        if on_cluster() and source.startswith("file://"):
            raise here_alone("data", str(path_of(source)))
    shape = check_source(recipe, recipe.source)
    judged = check_source(recipe, recipe.heldout_source) if recipe.heldout_source else shape
    if judged == "text":
        raise ForgeError(
            f"data {recipe.heldout_source or recipe.source}: plain texts ask nothing that a model could be scored on; "
            "give conversations in data.heldout_source"
        )
    pinned = {
        name: pin(recipe, source)[0]
        for name, source in (("source", recipe.source), ("heldout_source", recipe.heldout_source))
        if source
    }
    recipe = recipe.model_copy(update=pinned)
    return recipe, digest_source(recipe)


def check_training(recipe: TrainingRecipe, settings: Settings | None = None) -> list[GPU]:
    """There is such a shape, and it can run here; returns the GPUs of a node, none where CPUs train.

    On this machine, the processes of all nodes run side by side.
    """
    shape = find_shape(recipe.nodes, recipe.nproc_per_node)
    gpus, wanted = training_gpus(), recipe.nodes * recipe.nproc_per_node
    if on_cluster():
        check_cluster_has(shape)
        quota = settings.gpu_quota if settings else None
        if quota is not None and wanted > quota:
            raise ForgeError(
                f"training.nodes {recipe.nodes} with training.nproc_per_node {recipe.nproc_per_node}: needs {wanted} "
                f"GPUs, and the quota of this namespace allows {quota} (FORGE_GPU_QUOTA); its pods would never be "
                "made. Lower training.nodes or training.nproc_per_node, or run it in a domain with a larger quota"
            )
    elif gpus and wanted > len(gpus):
        raise ForgeError(
            f"training.nodes {recipe.nodes} with training.nproc_per_node {recipe.nproc_per_node}: each process takes a "
            f"GPU, and there are {len(gpus)}; lower them"
        )
    return gpus


def check_places(settings: Settings, rollout: bool) -> None:
    """On the cluster, where pods share no directory, all that a run leaves has a place outside them."""
    if not on_cluster():
        return
    wanted: dict[str, str | bool] = {
        "STORE": settings.store, "MLFLOW_URI": settings.mlflow_uri, "CHECKPOINT_COPIES": settings.checkpoint_copies,
        "S3_ENDPOINT": settings.s3_endpoint,
    }  # fmt: skip
    if rollout:
        wanted |= {
            "SERVING_TARGET=kubernetes (or FORGE_ROLLOUT=false)": settings.serving_target == "kubernetes",
            "SERVING_URL": settings.serving_url, "RECONCILER_URL": settings.reconciler_url,
        }  # fmt: skip
    if missing := [f"FORGE_{name}" for name, value in wanted.items() if not value]:
        raise ForgeError(
            f"the settings of the cluster's pods lack {', '.join(missing)}: set them in the ConfigMap forge-settings"
        )


def check_memory(recipe: Recipe, config: dict[str, Any], gpus: list[GPU]) -> None:
    """A training process fits the smallest of the GPUs, or all of them this machine."""
    gpu = min(gpus, key=lambda one: one.memory, default=None)
    check_fit(measure_model(config), recipe.training, recipe.data.max_seq_len, gpu)


def config_of(recipe: Recipe, base: LocalBase) -> dict[str, Any]:
    """The config.json of what is trained."""
    architecture = recipe.model.architecture
    return architecture_config(architecture, recipe.data.max_seq_len) if architecture else base_config(base)


def find_base(recipe: ModelRecipe, settings: Settings | None = None, store: Store | None = None) -> Base:
    """The base model, which must be there as safetensors, with a revision that pins its contents.

    One that is registered needs settings and store, which are None where they could not be opened.
    """
    if recipe.base is None:
        return Base()
    if is_registered(recipe.base):
        if settings is None or store is None:
            raise ForgeError(f"base model {recipe.base}: is in the store, which cannot be opened; fix that first")
        return registered_base(recipe.base, recipe.revision or "", settings, store)
    if on_cluster() and directory_of(recipe.base):
        raise here_alone("base model", recipe.base)
    directory = path_of(recipe.base).expanduser().absolute()
    if directory.is_dir():
        if not (directory / "config.json").is_file() or not list(directory.glob("*.safetensors")):
            raise ForgeError(
                f"base model {directory}: needs config.json and *.safetensors; save it with save_pretrained "
                "(pickled weights are not loaded)"
            )
        digest, _ = digest_directory(directory)
        if recipe.revision not in (None, digest):
            raise ForgeError(f"base model {directory}: its digest is {digest}, and model.revision is {recipe.revision}")
        return Base(location=directory.as_uri(), revision=digest)
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if recipe.revision and isinstance(
            try_to_load_from_cache(recipe.base, "config.json", revision=recipe.revision), str
        ):
            return Base(location=recipe.base, revision=recipe.revision)
        found = HfApi().model_info(recipe.base, revision=recipe.revision, timeout=5)
    except Exception as error:  # the client raises its HTTP library's errors as well as its own
        raise _not_to_be_had(recipe.base, error) from None
    return Base(location=recipe.base, revision=str(found.sha))


def base_config(base: LocalBase) -> dict[str, Any]:
    """The config.json of a base model that find_base found."""
    from huggingface_hub import hf_hub_download

    path = Path(base.location) / "config.json"
    try:
        if not path.is_file():
            path = Path(hf_hub_download(base.location, "config.json", revision=base.revision, etag_timeout=5))
    except Exception as error:  # as in find_base
        raise _not_to_be_had(base.location, error) from None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ForgeError(f"base model {base.location}: its config.json is no JSON object; save it with save_pretrained")
    return config


def _not_to_be_had(name: str, error: Exception) -> ForgeError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ForgeError(
        f"base model {name}: neither a directory here nor to be had from the hub ({reason}); give model.base the path "
        "of a directory in Hugging Face format, or models:/name@champion, or make the hub reachable (a gated model "
        "needs HF_TOKEN)"
    )


def check_champion(client: "MlflowClient", store: Store, name: str) -> None:
    """The champion that a new model will be compared with is there, if there is one."""
    champion = find_champion(client, name)
    if champion is not None:
        find_package(name, champion, store)


def check_copies(settings: Settings) -> None:
    """The bucket that checkpoints are to be copied to is there."""
    uri = settings.checkpoint_copies
    if not uri:
        return
    bucket, _ = split(uri)
    with connect(f"FORGE_CHECKPOINT_COPIES {uri}", settings) as client:
        if not client.bucket_exists(bucket):
            raise ForgeError(f"FORGE_CHECKPOINT_COPIES {uri}: there is no bucket {bucket}; make it, or name another")


def check_vllm(settings: Settings) -> None:
    """vLLM is installed."""
    if not vllm_release(settings.serving_python):
        raise ForgeError(NO_VLLM.format(settings.serving_python))


def check_port(settings: Settings) -> None:
    """The serving port is free, or our own server's."""
    running = LocalServer(settings).running()
    ours = running is not None and running.spec.port == settings.serving_port
    if not ours and not port_is_free(settings.serving_port):
        raise ForgeError(
            f"port {settings.serving_port} is in use by another program; stop it, or set FORGE_SERVING_PORT"
        )
