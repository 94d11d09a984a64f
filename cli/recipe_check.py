"""`forge check-recipe`: validate a recipe without running it, and show what it resolves to."""

from typing import TYPE_CHECKING, Any

import click

from forge.core.errors import ForgeError

if TYPE_CHECKING:
    from forge.cluster.gpus import GPU
    from forge.core.recipe import Recipe, TrainingRecipe


@click.command("check-recipe")
@click.argument("recipe")
def check_recipe(recipe: str) -> None:
    """Validate a recipe and show what it resolves to.

    RECIPE is a shipped recipe's name, a path, an s3:// URI, or the YAML itself. All problems are reported together,
    each with its file and line. Nothing is started or downloaded: `forge run` also checks the rows and the base model.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from forge.core.settings import load_settings
    from forge.storage.recipes import parse_recipe, read_recipe

    settings = load_settings()
    name, data = read_recipe(recipe)
    loaded = parse_recipe(name, data)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for topic, value in {
        "recipe": f"{name} is valid",
        "model": f"{loaded.name}{settings.name_suffix}",
        **resolved(loaded),
        "cluster": on_cluster(loaded.training),
        "rollout": "no, ends at a registered challenger" if loaded.serving.rollout is False else "yes, if it passes",
    }.items():
        table.add_row(topic, Text(value))
    Console().print(table)


def resolved(recipe: "Recipe") -> dict[str, str]:
    """What a run with this recipe would train, and how, by topic. ForgeError if no adapter fits the base model."""
    training, data = recipe.training, recipe.data
    facts = {
        "rows": data.source or "given with --data-path",
        "base model": recipe.model.base or "none, trained from scratch",
        "method": training.method,
        "batch": batch(training),
        "context": f"{data.max_seq_len} tokens, {training.precision}",
    }
    config = known_config(recipe)
    if config is None:
        return facts | {"parallelism": f"{training.parallelism}, on {processes(training)}", "memory": unknown(recipe)}
    from forge.capacity.model_size import measure_model

    size = measure_model(config)
    facts["base model"] += f" ({size.parameters / 1e6:,.1f} M parameters)"
    return facts | fits(size, recipe)


def batch(training: "TrainingRecipe") -> str:
    """The global batch as a product: processes, rows of a micro batch, and gradient accumulation."""
    share = training.global_batch_size // (training.nodes * training.nproc_per_node)
    micro = training.micro_batch_size or share
    product = f"{processes(training)} x micro batch {micro} x accumulation {share // micro}"
    return f"{training.global_batch_size} rows = {product}"


def processes(training: "TrainingRecipe") -> str:
    """The shape of training in words."""
    nodes, each = training.nodes, training.nproc_per_node
    return f"{nodes} node{'s' * (nodes > 1)} x {each} process{'es' * (each > 1)}"


def on_cluster(training: "TrainingRecipe") -> str:
    """Whether the cluster can run the shape of training; this machine runs any."""
    from forge.cluster.nodes import TrainingShape, find_shape

    try:
        find_shape(training.nodes, training.nproc_per_node)
    except ForgeError as error:
        return f"no, {error.what}: {error.fix}"
    return f"yes, {TrainingShape(training.nodes, training.nproc_per_node)}"


def fits(size: Any, recipe: "Recipe") -> dict[str, str]:
    """The parallelism, and the memory of one process with whether it fits, here and on the cluster's nodes."""
    import psutil

    from forge.capacity.training_memory import estimate_memory, resolve_parallelism
    from forge.cluster.gpus import GIB, find_gpus, gpus_of
    from forge.cluster.nodes import TRAINING

    training, context = recipe.training, recipe.data.max_seq_len
    world = training.nodes * training.nproc_per_node
    facts = {}
    for place, gpus in {"here": find_gpus(), "on the cluster": gpus_of(TRAINING)}.items():
        gpu = min(gpus, key=memory_of, default=None)
        parallelism = resolve_parallelism(size, training, context, gpu)
        memory = estimate_memory(size, training, context, parallelism)
        limit = gpu.usable if gpu else psutil.virtual_memory().total // world
        verdict = "fits" if memory.total <= limit else "does not fit"
        facts[f"parallelism {place}"] = f"{parallelism}, on {processes(training)}"
        needs = str(memory) if memory.total > GIB else f"{memory.total / GIB:.1f} GiB"
        where = gpu.name if gpu else "this machine's memory"
        facts[f"memory {place}"] = f"{needs} a process: {verdict} in {limit / GIB:.1f} GiB of {where}"
    return facts


def memory_of(gpu: "GPU") -> int:
    """The memory of a GPU, in bytes."""
    return gpu.memory


def known_config(recipe: "Recipe") -> dict[str, Any] | None:
    """The config.json of the model that is trained, if this machine has it; None if it must be downloaded first."""
    from forge.capacity.model_size import architecture_config
    from forge.core.settings import path_of
    from forge.models.hub import cached_config, model_config, parse_config
    from forge.registry.packages import LocalBase, is_registered

    if recipe.model.architecture:
        return architecture_config(recipe.model.architecture, recipe.data.max_seq_len)
    base = recipe.model.base or ""
    if is_registered(base):
        return None
    directory = path_of(base).expanduser().absolute()
    if directory.is_dir():
        return model_config(LocalBase(str(directory)))
    path = cached_config(base, recipe.model.revision)
    return parse_config(path.read_bytes(), base) if path else None


def unknown(recipe: "Recipe") -> str:
    """Why there is no estimate."""
    return f"not estimated: the config.json of {recipe.model.base} is not on this machine"
