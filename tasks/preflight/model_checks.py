"""Checks of the base model, and of the GPUs that train and serve the model."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from forge.capacity.decoder_shape import read_shape
from forge.capacity.model_size import architecture_config, measure_model
from forge.capacity.training_memory import check_fit
from forge.cluster.gpus import GPU, on_cluster, training_gpus
from forge.cluster.nodes import TrainingShape, check_cluster_has, find_shape
from forge.core.contracts import Base
from forge.core.digest import digest_model
from forge.core.errors import ForgeError
from forge.core.recipe import ModelRecipe, Recipe, TrainingRecipe
from forge.core.settings import Settings, path_of
from forge.models.chat import load_tokenizer
from forge.models.chat_format import ChatFormat, chat_format
from forge.models.conversation import Renderer
from forge.models.hub import (
    CONFIG,
    GENERATION_CONFIG,
    check_unquantised,
    generation_ends,
    model_config,
    pin_revision,
    weight_files,
)
from forge.registry.packages import LocalBase, directory_of, is_registered, local_base, registered_base
from forge.serving.rollout_check import check_rollout
from forge.serving.targets import read_serving
from forge.storage import Store
from tasks.preflight.data_checks import not_shared

LFS_POINTER = b"version https://git-lfs"


def check_training(recipe: TrainingRecipe, settings: Settings | None = None) -> list[GPU]:
    """Check that training can run in the recipe's shape; returns the GPUs of a node, none if CPUs train.

    On one machine, the processes of all nodes run side by side, in any number that it has GPUs for.
    """
    shape = TrainingShape(recipe.nodes, recipe.nproc_per_node)
    where = f"training.nodes {shape.nodes} with training.nproc_per_node {shape.nproc_per_node}"
    if on_cluster():
        find_shape(shape.nodes, shape.nproc_per_node)
        check_cluster_has(shape)
        quota = settings.gpu_quota if settings else None
        if quota is not None and shape.world_size > quota:
            raise ForgeError(
                f"needs {shape.world_size} GPUs, and the quota of this namespace allows {quota} (FORGE_GPU_QUOTA), so "
                "its pods would never be created",
                where=where,
                fix="lower training.nodes or training.nproc_per_node, or run it in a domain with a larger quota",
            )
    gpus = training_gpus(shape)
    if not on_cluster() and gpus and shape.world_size > len(gpus):
        raise ForgeError(
            f"each process takes a GPU, and this machine has {len(gpus)}",
            where=where,
            fix="lower training.nodes or training.nproc_per_node",
        )
    return gpus


def find_base(recipe: ModelRecipe, settings: Settings | None = None, store: Store | None = None) -> Base:
    """The recipe's base model, pinned by its revision. Raises ForgeError if it is not available as safetensors.

    `settings` and `store` are needed for a registered model only; they are None if they could not be opened.
    """
    if recipe.base is None:
        return Base()
    if is_registered(recipe.base):
        if settings is None or store is None:
            raise ForgeError(
                "is in the store, which cannot be opened", where=f"base model {recipe.base}", fix="fix the store first"
            )
        return registered_base(recipe.base, recipe.revision or "", settings, store)
    if on_cluster() and directory_of(recipe.base):
        raise not_shared("base model", recipe.base)
    directory = path_of(recipe.base).expanduser().absolute()
    if not directory.is_dir():
        return Base(location=recipe.base, revision=pin_revision(recipe.base, recipe.revision))
    where = f"base model {directory}"
    if not (directory / CONFIG).is_file() or not list(directory.glob("*.safetensors")):
        raise ForgeError(
            f"needs {CONFIG} and *.safetensors",
            where=where,
            fix="save it with save_pretrained (pickled weights are not loaded)",
        )
    digest = digest_model(directory)
    if recipe.revision not in (None, digest):
        raise ForgeError(
            f"its digest is {digest}, and model.revision is {recipe.revision}",
            where=where,
            fix="correct or remove model.revision",
        )
    return Base(location=directory.as_uri(), revision=digest)


def open_base(base: Base, settings: Settings, store: Store) -> LocalBase:
    """A base model on this machine."""
    if is_registered(base.location):
        return LocalBase(str(store.path(base.location)))  # find_base has just verified it
    return local_base(base, settings, store)


def check_trainable_base(recipe: Recipe, base: LocalBase, config: dict[str, Any]) -> ChatFormat | None:
    """Check what training would only find out after preprocessing: the base's files, tokenizer, sizes and end tokens.

    Returns its chat format. Of a model on the Hub only the configuration is here, so the rest is not checked.
    """
    where = f"base model {base.location}"
    check_unquantised(config, where)
    shape = read_shape(config, where)
    if shape.longest and recipe.data.max_seq_len > shape.longest:
        raise ForgeError(
            f"has {shape.longest} positions, and data.max_seq_len is {recipe.data.max_seq_len}",
            where=where,
            fix=f"set data.max_seq_len to {shape.longest} or less",
        )
    directory = Path(base.location)
    if not base.location:
        return chat_format(load_tokenizer(base, recipe.data.max_seq_len), where)
    if not directory.is_dir():
        return None
    for file in weight_files(directory):
        check_weights_file(file)
    check_generation_config(directory)
    tokenizer = load_tokenizer(base)
    form = chat_format(tokenizer, where)
    # Not the added tokens: Gemma 3's tokenizer has one for images, for which its text models have no embedding.
    highest = max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values())
    if highest >= shape.vocabulary:
        raise ForgeError(
            f"its tokenizer has token {highest}, and its embeddings end at {shape.vocabulary - 1} (vocab_size)",
            where=where,
            fix="use the tokenizer that belongs to it",
        )
    ends = Renderer(form, where).probe().ends  # evaluation renders conversations, even if training has plain texts
    if recipe.training.method != "full" and recipe.serving.rollout:
        known = generation_ends(directory, config) | {tokenizer.eos_token_id}
        check_adapter_can_end(where, {token: tokenizer.convert_tokens_to_ids(token) for token in ends}, known)
    return form


def check_weights_file(file: Path) -> None:
    """Raise ForgeError if a file of weights is missing or not whole."""
    if not file.is_file():
        raise ForgeError("is missing", where=str(file), fix="copy it again")
    with file.open("rb") as opened:
        pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
    fix = "run git lfs pull" if pointer else "copy it again"
    if pointer:
        raise ForgeError("is a git-lfs pointer, not the weights", where=str(file), fix=fix)
    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ForgeError(f"is damaged ({error})", where=str(file), fix=fix) from None


def check_generation_config(directory: Path) -> None:
    """Raise ForgeError if a model has a generation config that transformers does not load."""
    file = directory / GENERATION_CONFIG
    if not file.is_file():
        return
    from transformers import GenerationConfig  # takes seconds to import

    try:
        GenerationConfig.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(f"cannot be used ({reason})", where=str(file), fix="correct it, or remove it") from None


def check_adapter_can_end(where: str, learned: dict[str, int], known: set[int]) -> None:
    """Raise ForgeError if an adapter learns to end turns with none of the tokens at which its base's server stops.

    `learned` are those end tokens with their numbers, and `known` those of the base.
    """
    if not known & set(learned.values()):
        raise ForgeError(
            f"its chat template ends turns with {', '.join(sorted(learned))}, which is not in eos_token_id of its "
            "generation_config.json, and adapters are served with the base's: their answers would never end",
            where=where,
            fix=f"add {', '.join(map(str, sorted(learned.values())))} to eos_token_id there, or set training.method "
            "to full",
        )


def trained_config(recipe: Recipe, base: LocalBase) -> dict[str, Any]:
    """The config.json of the model to train."""
    architecture = recipe.model.architecture
    return architecture_config(architecture, recipe.data.max_seq_len) if architecture else model_config(base)


def check_memory(recipe: Recipe, config: dict[str, Any], gpus: list[GPU]) -> None:
    """Check that a training process fits the smallest of the GPUs, or that all processes fit this machine's memory."""
    gpu = min(gpus, key=lambda one: one.memory, default=None)
    check_fit(measure_model(config), recipe.training, recipe.data.max_seq_len, gpu)


def check_room_to_serve(recipe: Recipe, base: Base, config: dict[str, Any], settings: Settings) -> None:
    """Check that the trained model can be served, given what is served now."""
    check_rollout(recipe, base, config, read_serving(settings), settings)
