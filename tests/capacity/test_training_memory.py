"""The estimate agrees with the memory that torch takes, and a training that does not fit is refused with a fix."""

import weakref
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from forge.capacity.model_size import BYTE_VOCABULARY, ModelSize, _measure, architecture_config, measure_model
from forge.capacity.training_memory import Memory, check_fit, estimate_memory, resolve_parallelism
from forge.cluster import gpus
from forge.cluster.gpus import GIB, GPUS, find_gpus
from forge.core.errors import ForgeError
from forge.core.recipe import Architecture, Lora, TrainingRecipe
from forge.models.chat import byte_tokenizer
from forge.storage.recipes import RECIPES, load_recipe
from tasks.finetune.data import Batch
from tasks.finetune.loss import TrainedTokenLoss
from tasks.finetune.model import add_adapter

A100 = GPUS["A100-40GB"]
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama_8b() -> ModelSize:
    return measure_model(LLAMA_8B)


def training(**changes: Any) -> TrainingRecipe:
    values = {"global_batch_size": 16, "epochs": 1, "learning_rate": 1e-4, **changes}
    return TrainingRecipe.model_validate(values)


def build(config: dict[str, Any], recipe: TrainingRecipe, device: str = "cpu") -> Any:
    """The model as in training."""
    dtype = torch.bfloat16 if recipe.lora and recipe.precision == "bf16" else torch.float32
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).to(device)
    if recipe.lora:
        add_adapter(causal, recipe.lora, seed=0)
    return causal


def size_of(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "lora", [None, {"rank": 3}, {"rank": 4, "target_modules": ["o_proj", "down_proj"]}], ids=["full", "all", "two"]
)
def test_weights_gradients_and_optimizer_are_exact(kind: str, precision: str, lora: dict | None) -> None:
    config = {"model_type": kind, **TINY, "num_hidden_layers": 2}
    recipe = training(precision=precision, method="lora" if lora else "full", lora=lora)
    estimate = estimate_memory(measure_model(config), recipe, 16, "none")
    causal = build(config, recipe)
    trained = [parameter for parameter in causal.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        causal(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert estimate.weights == size_of(causal.parameters())
    assert estimate.gradients == size_of(one.grad for one in trained)
    assert estimate.optimizer == size_of(moments)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA_8B,
        {**LLAMA_8B, "head_dim": 64, "num_hidden_layers": 3},
        {"model_type": "llama", **TINY, "tie_word_embeddings": True},
        {"model_type": "llama", **TINY, "num_key_value_heads": None, "tie_word_embeddings": False},
        architecture_config(Architecture(hidden_size=96, layers=3, heads=3, intermediate_size=160), 64),
        {"model_type": "llama", **TINY, "attention_bias": True, "tie_word_embeddings": True},
        {"model_type": "llama", **TINY, "mlp_bias": True, "tie_word_embeddings": True},
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1},
    ],
)
def test_the_computed_size_of_a_llama_is_the_measured_one(config: dict[str, Any]) -> None:
    assert measure_model(config) == _measure(config)


def test_published_counts(llama_8b: ModelSize) -> None:
    assert llama_8b.parameters == 8_030_261_248
    assert measure_model(LLAMA_70B).parameters == 70_553_706_496
    assert llama_8b.adapter(Lora(rank=16)) == 41_943_040


def test_the_size_of_a_model_from_scratch(tmp_path: Any) -> None:
    assert len(byte_tokenizer(64)) == BYTE_VOCABULARY
    architecture = Architecture(hidden_size=64, layers=3, heads=2, intermediate_size=96)
    size = measure_model(architecture_config(architecture, 64))
    assert (size.layers, size.vocabulary, size.norms) == (3, 262, 2)
    assert size.outside == 262 * 64 + 64  # the tied embeddings, and the final norm


class Live(TorchDispatchMode):
    """Counts the bytes of live tensors, and their peak."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._add(one.untyped_storage())
        return result


def train_two_steps(causal: Any, recipe: TrainingRecipe, vocabulary: int, context: int, device: str = "cpu") -> None:
    """Train as the trainer does: micro batches of two rows with two documents each, accumulated over two."""
    loss_of = TrainedTokenLoss(causal).train()
    if recipe.activation_checkpointing != "none":
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.activation_checkpointing == "selective":
            for layer in causal.base_model.layers[1::2]:
                layer.gradient_checkpointing = False
    trained = [parameter for parameter in causal.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    tokens = torch.randint(vocabulary, (2, context), device=device)
    positions = torch.arange(context // 2, device=device).repeat(2, 2)
    for _ in range(2):
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = loss_of(Batch(tokens, positions, tokens))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"precision": "fp32"}),
        ("llama", {}),
        ("llama", {"activation_checkpointing": "selective"}),
        ("llama", {"activation_checkpointing": "full"}),
        ("qwen3", {"activation_checkpointing": "selective"}),
        ("gemma3_text", {}),
        ("phi3", {}),
        ("llama", {"method": "lora", "lora": {"rank": 8}}),
        ("llama", {"method": "lora", "lora": {"rank": 8}, "activation_checkpointing": "full"}),
        ("llama", {"method": "lora", "lora": {"rank": 8}, "precision": "fp32"}),
    ],
)
def test_the_estimate_agrees_with_the_peak_of_a_step(kind: str, changes: dict) -> None:
    """Within 15 %: the estimate ignores the libraries' workspaces, and some operations are approximated."""
    config, context = {"model_type": kind, **TINY}, 128
    recipe = training(global_batch_size=4, micro_batch_size=2, **changes)
    causal = build(config, recipe)
    live = Live(list(causal.parameters()))
    with live:
        train_two_steps(causal, recipe, TINY["vocab_size"], context)
    estimate = estimate_memory(measure_model(config), recipe, context, "none")
    assert estimate.total == pytest.approx(live.peak, rel=0.15), estimate


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_the_estimate_agrees_with_the_peak_of_a_gpu(method: str, checkpointing: str) -> None:
    """Within 25 %: the estimate ignores attention kernels and the allocator's rounding (512 bytes and more)."""
    config = {
        **LLAMA_8B, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8, "vocab_size": 32768,
        "num_attention_heads": 16, "num_key_value_heads": 4,
    }  # fmt: skip
    lora = {"rank": 16} if method == "lora" else None
    recipe = training(
        global_batch_size=4, micro_batch_size=2, method=method, lora=lora, activation_checkpointing=checkpointing
    )
    causal = build(config, recipe, "cuda")
    torch.cuda.reset_peak_memory_stats()
    train_two_steps(causal, recipe, 32768, 2048, "cuda")
    estimate = estimate_memory(measure_model(config), recipe, 2048, "none")
    assert estimate.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.25), estimate


def test_sharding_divides_weights_gradients_and_optimizer(llama_8b: ModelSize) -> None:
    recipe = training(nodes=2, nproc_per_node=2)
    whole, ddp, hybrid, fsdp = (
        estimate_memory(llama_8b, recipe, 4096, how) for how in ("none", "ddp", "hybrid", "fsdp")
    )
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(whole, part) == getattr(ddp, part) == 2 * getattr(hybrid, part) == 4 * getattr(fsdp, part)
    assert ddp.buckets == ddp.gradients
    assert whole.buckets == hybrid.buckets == fsdp.buckets == 0


def test_checkpointing_and_shorter_rows_need_less_memory(llama_8b: ModelSize) -> None:
    def activations(context: int = 4096, **changes: Any) -> int:
        return estimate_memory(llama_8b, training(**changes), context, "none").activations

    none, selective, full = (activations(activation_checkpointing=how) for how in ("none", "selective", "full"))
    assert none > selective > full > 0
    assert activations(micro_batch_size=4) * 4 == none
    assert activations(2048) < none / 2  # the mask grows quadratically


def test_quantized_weights_take_about_half_a_byte(llama_8b: ModelSize) -> None:
    recipe = training(method="qlora", lora={"rank": 16})
    quantized = llama_8b.parameters - 2 * llama_8b.head - 65 * 4096  # all but embeddings, output layer and norms
    weights = estimate_memory(llama_8b, recipe, 4096, "none").weights
    bits = (weights - 2 * (llama_8b.parameters - quantized) - 4 * llama_8b.adapter(Lora())) * 8 / quantized
    assert bits == pytest.approx(4.127, abs=1e-3)  # QLoRA, section 3


@pytest.mark.parametrize(
    ("changes", "gpu", "expected"),
    [
        ({}, A100, "none"),
        ({"parallelism": "fsdp"}, A100, "none"),
        ({"nproc_per_node": 2}, A100, "fsdp"),
        ({"nproc_per_node": 2}, None, "ddp"),
        ({"nodes": 2, "nproc_per_node": 2}, A100, "fsdp"),
        ({"nodes": 2, "nproc_per_node": 2}, GPUS["H100-80GB"], "hybrid"),
        ({"nproc_per_node": 2, "method": "lora", "lora": {}}, A100, "ddp"),
        ({"nproc_per_node": 2, "method": "lora", "lora": {}, "parallelism": "fsdp"}, A100, "fsdp"),
    ],
)
def test_auto_parallelism(llama_8b: ModelSize, changes: dict, gpu: Any, expected: str) -> None:
    recipe = training(micro_batch_size=1, activation_checkpointing="full", **changes)
    assert resolve_parallelism(llama_8b, recipe, 4096, gpu) == expected


def test_8b_in_full_does_not_fit_one_a100(llama_8b: ModelSize) -> None:
    with pytest.raises(ForgeError) as caught:
        check_fit(llama_8b, training(), 4096, A100)
    message = caught.value.message
    assert "weights 29.9, gradients 29.9, optimizer 59.8" in message
    assert "A100-40GB has 38.0 GiB for it (of 40.0)" in message
    assert "activation_checkpointing full, training.method lora, training.lora {rank: 16}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "context", "fix"),
    [
        ({"global_batch_size": 2}, 2048, "training.micro_batch_size 1"),
        ({"global_batch_size": 1}, 4096, "training.activation_checkpointing selective"),
        ({"global_batch_size": 2}, 4096, "training.activation_checkpointing full"),
        (
            {"global_batch_size": 2, "nproc_per_node": 2, "parallelism": "ddp", "activation_checkpointing": "full"},
            36_864,
            "training.parallelism fsdp",
        ),
        ({"global_batch_size": 1, "activation_checkpointing": "full"}, 65_536, "data.max_seq_len 32768"),
        ({"global_batch_size": 8}, 8192, "training.micro_batch_size 4, training.activation_checkpointing full"),
    ],
)  # fmt: skip
def test_the_smallest_change_is_named(llama_8b: ModelSize, changes: dict, context: int, fix: str) -> None:
    """For LoRA on one A100-40GB."""
    with pytest.raises(ForgeError) as caught:
        check_fit(llama_8b, training(**{"method": "lora", "lora": {}, **changes}), context, A100)
    assert caught.value.message.endswith(f"; it fits with {fix}")


def test_no_change_makes_it_fit(llama_8b: ModelSize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 4 * GIB}))
    with pytest.raises(ForgeError, match=r"this machine has 2.0 GiB for each of 2 processes; no change to the recipe"):
        check_fit(llama_8b, training(nproc_per_node=2), 4096)


def test_every_shipped_recipe_fits_its_gpus(llama_8b: ModelSize) -> None:
    bases = {"8B": llama_8b, "70B": measure_model(LLAMA_70B)}
    fitted: dict[str, Memory] = {}
    for path in RECIPES.glob("*.yaml"):
        recipe = load_recipe(str(path))
        context = recipe.data.max_seq_len
        if recipe.model.architecture:
            size, gpu = measure_model(architecture_config(recipe.model.architecture, context)), None
        else:
            size, gpu = next(size for name, size in bases.items() if f"-{name}-" in str(recipe.model.base)), A100
        fitted[path.stem] = check_fit(size, recipe.training, context, gpu)
    assert {"llama-3.1-8b-full", "llama-3.1-8b-lora", "llama-3.1-70b-qlora", "tiny-cpu"} <= set(fitted)


def test_an_unknown_model_type_is_refused() -> None:
    for config in ({}, {"model_type": "nonsense"}, {**LLAMA_8B, "num_hidden_layers": "many"}, {"model_type": "t5"}):
        with pytest.raises(ForgeError, match="take a base model of a type that transformers supports"):
            measure_model(config)


@pytest.mark.parametrize("modules", [["query"], ["q_proj", "v_porj"], ["q_proj", "lm_head"]])
def test_target_modules_that_cannot_be_adapted_are_an_error(modules: list[str], llama_8b: ModelSize) -> None:
    with pytest.raises(ForgeError, match=rf"target_modules \['{modules[-1]}'\]: .* its linear layers are down_proj"):
        llama_8b.adapter(Lora(target_modules=modules))


def test_gpus_are_found_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def nothing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(gpus.importlib.metadata, "version", lambda name: "2.13.0+cu130")
    monkeypatch.setattr(pynvml, "nvmlInit", nothing)
    assert find_gpus() == []
    memory = type("Memory", (), {"total": A100.memory})
    for name, value in {
        "nvmlInit": lambda: None, "nvmlDeviceGetCount": lambda: 2, "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: f"NVIDIA A100-SXM4-40GB {handle}",
        "nvmlDeviceGetMemoryInfo": lambda handle: memory,
    }.items():  # fmt: skip
        monkeypatch.setattr(pynvml, name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.name[-1] for gpu in find_gpus()] == ["0", "1"]
    assert {gpu.memory for gpu in find_gpus()} == {A100.memory}
    for visible, expected in (("1", ["1"]), ("1,0", ["1", "0"]), ("0,7,1", ["0"]), ("-1", []), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.name[-1] for gpu in find_gpus()] == expected
    monkeypatch.setattr(gpus.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert find_gpus() == []


def test_an_estimate_names_its_parts() -> None:
    memory = Memory(GIB, 2 * GIB, 0, 0, 0, GIB // 2, 0)
    assert str(memory) == "3.5 GiB (weights 1.0, gradients 2.0, activations 0.5)"
    assert memory.total == sum(asdict(memory).values())
