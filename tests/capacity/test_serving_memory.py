"""The estimate allocates as vLLM does, and a model that does not fit is refused with the calculation and a fix."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.capacity.decoder_shape import read_shape
from forge.capacity.serving_memory import Fit, check_serving
from forge.cluster.gpus import GIB, GPU, GPUS, gpus_of
from forge.cluster.nodes import SERVING
from forge.core.contracts import Engine
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import MAX_LORA_RANKS

A100 = GPUS["A100-40GB"]
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip
LLAMA_70B_AWQ = {
    **LLAMA_70B, "torch_dtype": "float16",
    "quantization_config": {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True},
}  # fmt: skip
WEIGHTS_8B, WEIGHTS_70B = 2 * 8_030_261_248, 2 * 70_553_706_496  # bytes
WEIGHTS_70B_AWQ = 39_770_000_000
SMALL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "torch_dtype": "float32",
}  # fmt: skip


def engine(**changes: Any) -> Engine:
    return Engine.model_validate({"max_model_len": 4096, **changes})


def check(config: dict[str, Any], size: int, gpus: int, **changes: Any) -> Fit:
    """Check on this many A100-40GB, with tensor parallelism over all. Changes named as Engine's fields apply to it."""
    fields = {name: changes.pop(name) for name in list(changes) if name in Engine.model_fields}
    of = engine(**{"tensor_parallel": max(1, gpus), **fields})
    return check_serving(config, size, of, [A100] * gpus, "base", **changes)


def refusal(*arguments: Any, **changes: Any) -> str:
    with pytest.raises(ForgeError) as caught:
        check(*arguments, **changes)
    return caught.value.message


def test_70b_in_bf16_does_not_fit_the_inference_node() -> None:
    both = engine(tensor_parallel=2)
    with pytest.raises(ForgeError) as caught:
        check_serving(LLAMA_70B, WEIGHTS_70B, both, gpus_of(SERVING), "meta-llama/Llama-3.1-70B", concurrency=8)
    message = caught.value.message
    assert message.startswith(
        "meta-llama/Llama-3.1-70B cannot be served: each of 2 x A100-40GB needs 73.8 GiB (weights "
    )
    assert "weights 65.7 of 131.4, adapters 0.5 in 2 slots of rank 16" in message
    assert "KV cache 5.0 for 8 sequences of 4096 tokens, 160 KiB per token)" in message
    assert "vLLM takes 36.2 of its 39.4; it fits with tensor parallelism over 8 x A100-40GB, or with 4-bit" in message
    assert (
        "hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4): 37.0 GiB, 18.5 per GPU, with a KV cache for 23"
        in message
    )
    assert "\n" not in message


def test_the_awq_estimate_agrees_with_the_awq_build() -> None:
    assert "37.0 GiB, 18.5 per GPU" in refusal(LLAMA_70B, WEIGHTS_70B, 2)
    for slots in (0, 2):
        fit = check(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, 2, max_loras=slots, concurrency=22)
        assert 22 <= fit.sequences <= 25
        assert fit.weights / GIB == pytest.approx(18.5, abs=0.05)
        assert fit.token * 80 == 160 * 2**10
    assert "4-bit" not in refusal(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, 1)


def test_awq_is_suggested_with_a_context_that_fits() -> None:
    message = refusal(LLAMA_70B, WEIGHTS_70B, 2, max_model_len=None, concurrency=8)
    assert message.endswith("4-bit AWQ weights and serving.max_model_len 12016: 37.0 GiB, 18.5 per GPU, with a KV "
                            "cache for 8 sequences of 12016 tokens")  # fmt: skip
    check(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, 2, max_model_len=12016, concurrency=8)


def test_8b_fits_one_gpu_and_two() -> None:
    one, two = (check(LLAMA_8B, WEIGHTS_8B, gpus, concurrency=8) for gpus in (1, 2))
    assert str(one) == (
        "vLLM takes 36.2 GiB of each of 1 x A100-40GB: weights 15.0, adapters 0.2 in 2 slots of rank 16, activations "
        "and CUDA graphs 2.4, KV cache 18.7 (128 KiB per token: 37 sequences of 4096 tokens together)"
    )
    assert one.weights == 2 * two.weights
    assert one.token == 2 * two.token
    assert two.sequences > 2 * one.sequences  # the KV cache gets all the memory that sharding frees


def test_the_cheapest_changes_are_named_and_fit() -> None:
    message = refusal(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, 2, concurrency=40)
    assert message.endswith(
        "it fits with serving.concurrency 23, or with serving.max_model_len 2400, or with tensor parallelism over 4 x "
        "A100-40GB"
    )
    check(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, 2, concurrency=23)
    check(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, 2, max_model_len=2400, concurrency=40)
    check(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, 4, concurrency=40)
    assert "serving.concurrency 24" in refusal(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, 2, max_loras=0, concurrency=25)
    wide = {"max_loras": 8, "max_lora_rank": 512}
    message = refusal(LLAMA_8B, WEIGHTS_8B, 1, **wide, concurrency=8, adapters=4, adapter_rank=64)
    assert "it fits with serving.max_loras 4, or with serving.max_lora_rank 64, or with" in message
    check(LLAMA_8B, WEIGHTS_8B, 1, max_loras=8, max_lora_rank=64, concurrency=8)
    assert "serving.max_model_len 19104" in refusal(LLAMA_8B, WEIGHTS_8B, 1, max_model_len=None, concurrency=8)


def test_no_change_helps() -> None:
    assert refusal(LLAMA_70B, 100 * WEIGHTS_70B, 2).endswith("; no change helps; take a smaller base model")


def test_adapter_slots_are_as_vllm_allocates_them() -> None:
    """The totals are what vLLM 0.32 allocated for these shapes on one and two devices, with three slots of rank 8."""
    rank, shape = 8, read_shape(SMALL, "small")
    inputs = 3 * 128 + 128 + 2 * 128 + 352  # A of q, k, v; o; gate, up; down
    outputs = 128 + 2 * 64 + 128 + 2 * 352 + 128  # B of the same
    ends = 512 + 128 + 128 + 512  # A and B of embeddings and of logits
    assert 3 * shape.slot(rank, 1) == 3 * 4 * rank * (3 * (inputs + outputs) + ends) == 795_648
    inputs = 3 * 128 + 128 // 2 + 2 * 128 + 352 // 2  # on two GPUs, o and down have half of A
    outputs = 128 // 2 + 2 * 32 + 128 + 2 * 352 // 2 + 128  # and all others have half of B
    assert 3 * shape.slot(rank, 2) == 3 * 4 * rank * (3 * (inputs + outputs) + ends) == 588_288
    inputs = 3 * 128 + 128 // 4 + 2 * 128 + 352 // 4
    outputs = 128 // 4 + 2 * 32 + 128 + 2 * 352 // 4 + 128  # two KV heads are replicated over four GPUs
    assert shape.slot(rank, 4) == 4 * rank * (3 * (inputs + outputs) + ends)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    assert 3 * read_shape({**SMALL, **experts}, "experts").slot(rank, 1) == 1_193_088


def test_slots_take_memory_from_the_cache() -> None:
    none, two, four = (check(LLAMA_8B, WEIGHTS_8B, 1, max_loras=slots) for slots in (0, 2, 4))
    assert none.adapters == 0
    assert four.adapters == 2 * two.adapters == none.free - four.free
    # An adapter of rank 16 for all linear layers has 41,943,040 weights; embeddings and logits add little.
    assert two.adapters / 2 == pytest.approx(2 * 41_943_040, rel=0.11)


def test_few_kv_heads_are_replicated() -> None:
    config = {**LLAMA_8B, "num_key_value_heads": 2}
    tokens = [check(config, WEIGHTS_8B, gpus).token for gpus in (1, 2, 4, 8)]
    assert tokens == [2 * 2 * 128 * 2, 2 * 128 * 2, 2 * 128 * 2, 2 * 128 * 2]


def test_windows_bound_the_cache() -> None:
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(32)]
    text = {**LLAMA_8B, "layer_types": kinds, "sliding_window": 1024}
    fit = check({"text_config": text, "torch_dtype": "bfloat16"}, WEIGHTS_8B, 1, max_model_len=65_536)
    assert fit.sequence(65_536) == fit.token * (5 * 65_536 + 27 * (1024 + 2048))


def test_indivisible_heads_are_refused() -> None:
    message = refusal(LLAMA_8B, WEIGHTS_8B, 3)
    assert "over 3 GPUs: 32 attention heads, 8 KV heads and MLPs of 14336 can't be divided by it" in message
    assert message.endswith("; take 1, 2, 4, 8, 16")
    assert "over 2 GPUs: there are 1" in refusal(LLAMA_8B, WEIGHTS_8B, 1, tensor_parallel=2)


def test_adapters_that_do_not_fit_the_slots_are_refused() -> None:
    for gpus in (0, 1):
        message = refusal(LLAMA_8B, WEIGHTS_8B, gpus, adapters=1, adapter_rank=40)
        assert message == (
            "base cannot be served: adapter of rank 40: the base is served with serving.max_lora_rank 16; take "
            "serving.max_lora_rank 64, which restarts vLLM"
        )
        message = refusal(LLAMA_8B, WEIGHTS_8B, gpus, adapters=4, adapter_rank=16)
        assert "serving.max_loras 2: 4 adapters are loaded together" in message
        assert "take 4, which restarts vLLM" in message
        assert "vLLM takes 1, 8, 16" in refusal(LLAMA_8B, WEIGHTS_8B, gpus, max_lora_rank=24)
        assert "train with at most 512" in refusal(LLAMA_8B, WEIGHTS_8B, gpus, adapters=1, adapter_rank=1024)


def test_a_longer_context_than_the_model_s_is_refused() -> None:
    message = refusal(LLAMA_8B, WEIGHTS_8B, 1, max_model_len=131_073)
    assert "serving.max_model_len 131073: the model's context is 131072 tokens; take no more" in message
    assert "max_model_len 8192: the server was started with 4096" in refusal(LLAMA_8B, WEIGHTS_8B, 1, context=8192)
    stretched = {**LLAMA_8B, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    check(stretched, WEIGHTS_8B, 0, max_model_len=262_144)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(Problems) as caught:
        check(LLAMA_8B, WEIGHTS_8B, 3, adapters=4, adapter_rank=64, max_model_len=200_000)
    assert len(caught.value.problems) == 4


def test_the_memory_of_a_cpu_is_not_checked() -> None:
    fit = check(LLAMA_70B, WEIGHTS_70B, 0, concurrency=1000, adapters=2, adapter_rank=16)
    assert str(fit) == "no GPU, so memory is not checked"


def test_an_incomplete_config_is_refused() -> None:
    with pytest.raises(ForgeError, match=r"base: its config.json has no hidden_size; take a base model whose"):
        check({"model_type": "llama"}, WEIGHTS_8B, 1)


def test_one_sequence_of_the_full_length_must_fit_too() -> None:
    message = refusal(LLAMA_8B, WEIGHTS_8B + 4 * GIB, 1, max_model_len=None, context=4096, concurrency=4)
    assert "KV cache 16.0 for 1 sequence of 131072 tokens" in message
    assert "serving.max_model_len 120" in message


@settings(max_examples=200, deadline=None)
@given(
    memory=st.integers(8, 200), gpus=st.sampled_from([1, 2, 4, 8]), slots=st.integers(0, 8),
    rank=st.sampled_from(MAX_LORA_RANKS), context=st.integers(1, 131_072), concurrency=st.integers(1, 64),
    size=st.integers(GIB, 64 * GIB),
)  # fmt: skip
def test_smaller_changes_never_need_more_memory(
    memory: int, gpus: int, slots: int, rank: int, context: int, concurrency: int, size: int
) -> None:
    fit = Fit(
        read_shape(LLAMA_8B, "8B"), size, slots, rank, GPU("A100", memory * GIB), gpus, context, context, concurrency
    )
    lesser = [
        replace(fit, weight_bytes=size // 2), replace(fit, slots=slots // 2), replace(fit, gpus=2 * gpus),
        replace(fit, concurrency=max(1, concurrency // 2)), fit.shorten(max(1, context // 2)),
        replace(fit, rank=MAX_LORA_RANKS[max(0, MAX_LORA_RANKS.index(rank) - 1)]),
    ]  # fmt: skip
    assert all(one.free - one.cache >= fit.free - fit.cache for one in lesser)
    assert (fit.sequences >= concurrency) == (fit.cache <= fit.free)


def test_no_torch_is_imported() -> None:
    code = "import sys, forge.capacity.serving_memory; print({'torch', 'transformers'} & sys.modules.keys() or [])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
