"""vLLM's command line for a base model and its adapters, the same on this machine and on the cluster."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from forge.core.contracts import Engine
from forge.core.recipe import ServingRecipe
from forge.serving.desired import Failed, Served
from forge.serving.vllm_environment import saved_dtype

MODULE = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "forge.serving.aliases.PublicNames"
DRAIN = 60  # seconds that vLLM waits on SIGTERM for requests in flight
# Lets the reconciler load adapters through the API, and anyone else who can reach vLLM's port. See docs/serving.md.
VARIABLES = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
NAMES = "SERVED_NAMES"  # the environment variable with the path of the file of public names (aliases.py)


def arguments(base: Served, path: str, engine: Engine) -> list[str]:
    """vLLM's arguments, apart from host and port. `path` is the base's directory."""
    options = ["--model", path, "--served-model-name", base.versioned, "--dtype", saved_dtype(Path(path))]
    options += ["--middleware", MIDDLEWARE, "--shutdown-timeout", str(DRAIN)]
    if engine.max_loras:
        options += ["--enable-lora", "--max-loras", str(engine.max_loras)]
        options += ["--max-lora-rank", str(engine.max_lora_rank)]
    if engine.max_model_len is not None:
        options += ["--max-model-len", str(engine.max_model_len)]
    if engine.tensor_parallel > 1:
        options += ["--tensor-parallel-size", str(engine.tensor_parallel)]
    return options


def on_cpu(path: str, engine: Engine) -> list[str]:
    """Additional arguments for vLLM on a CPU. Raises Failed if the weights cannot be read.

    With adapters, they list the target modules, and so leave out the output layer, which Forge's adapters never change.
    vLLM would allocate adapter weights for it too. On a CPU it then crashes on a request for the logprobs of a prompt
    (prompt_logprobs; echo with logprobs) that shares a batch with another request, since two tensors differ in their
    number of rows (github.com/vllm-project/vllm issues 29955 and 51594, pull 51597).
    """
    try:
        names = sorted(set(linear_layers(Path(path)))) if engine.max_loras else []
    except (SafetensorError, OSError) as error:
        raise Failed(f"the weights in {path} cannot be read: {error}") from None
    return ["--enforce-eager", *(["--lora-target-modules", *names] if names else [])]


def linear_layers(model: Path) -> Iterator[str]:
    """The last part of the name of each linear layer in a model's numbered blocks, such as q_proj."""
    for path in model.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                *block, layer, kind = name.split(".")
                numbered = any(part.isdecimal() for part in block)
                if numbered and kind == "weight" and len(file.get_slice(name).get_shape()) == 2:
                    yield layer


def engine_of(recipe: ServingRecipe) -> Engine:
    """The options for a base that a recipe brings along, on one GPU; the memory check sets the number of GPUs."""
    return Engine(max_loras=recipe.max_loras, max_lora_rank=recipe.max_lora_rank, max_model_len=recipe.max_model_len)
