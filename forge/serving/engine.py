"""How vLLM is started to serve a base and its adapters: the same on this machine and on the cluster."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from forge.core.contracts import Engine
from forge.core.recipe import ServingRecipe
from forge.serving.desired import Failed, Served
from forge.serving.vllm_environment import saved_dtype

MODULE = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "forge.serving.aliases.PublicNames"
DRAIN = 60  # seconds that requests in flight have when vLLM is told to end
# Lets the reconciler load adapters by the API; whoever reaches vLLM's port can. See docs/serving.md.
VARIABLES = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
NAMES = "SERVED_NAMES"  # the variable with the path of the file of public names, which the middleware reads


def arguments(base: Served, path: str, engine: Engine) -> list[str]:
    """vLLM's arguments, but for where it listens. `path` is the base's directory."""
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
    """What vLLM is given besides, where it runs on a CPU.

    For models like Llama, vLLM makes room for adapters of the output layer too, which Forge's never change. On a CPU,
    it is then ended by whoever asks how likely a prompt is (prompt_logprobs; echo with logprobs) in the same step as
    another request: the rows of two tensors differ. On a GPU those rows are not added (github.com/vllm-project/vllm
    issues 29955 and 51594, pull 51597). So the output layer is left out, by naming the others.

    Raises Failed where the weights cannot be read.
    """
    try:
        names = sorted(set(linear_layers(Path(path)))) if engine.max_loras else []
    except (SafetensorError, OSError) as error:
        raise Failed(f"the weights in {path} cannot be read: {error}") from None
    return ["--enforce-eager", *(["--lora-target-modules", *names] if names else [])]


def linear_layers(model: Path) -> Iterator[str]:
    """The last name of each linear layer within a model's numbered blocks, such as q_proj."""
    for path in model.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                *block, layer, kind = name.split(".")
                numbered = any(part.isdecimal() for part in block)
                if numbered and kind == "weight" and len(file.get_slice(name).get_shape()) == 2:
                    yield layer


def engine_of(recipe: ServingRecipe) -> Engine:
    """How vLLM is started where a recipe needs a base of its own, on one GPU; the fit check says on how many."""
    return Engine(max_loras=recipe.max_loras, max_lora_rank=recipe.max_lora_rank, max_model_len=recipe.max_model_len)
