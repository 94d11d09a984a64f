"""The check of a model before training: whether it keeps packed documents apart, and computes the expected loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    CohereConfig,
    FalconH1Config,
    Gemma3Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from forge.core.errors import ForgeError
from forge.core.recipe import ModelRecipe, TrainingRecipe
from forge.registry.packages import LocalBase
from tasks.finetune.data import IGNORED, PackedRows, micro_batches
from tasks.finetune.export import export
from tasks.finetune.loss import TrainedTokenLoss
from tasks.finetune.model_check import keeps_documents_apart
from tasks.finetune.process_group import Rank
from tasks.finetune.train import Trainer, TrainingJob
from tests.finetune.job import CONFIGS, CONTEXT, SMALL, curve, run, write_base, write_data, write_recipe

MORE: dict[str, Any] = {**SMALL, "head_dim": 16}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
LINEAR = {f"linear_{what}": 16 for what in ("key_head_dim", "value_head_dim")} | {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
}
BLOOM = BloomConfig(vocab_size=262, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2, eos_token_id=1)
APART = {
    **CONFIGS,
    "cohere (scales its logits)": CohereConfig(**SMALL, logit_scale=0.25),
    "granite (divides its logits)": GraniteConfig(**SMALL, logits_scaling=4.0),
    "llama4": Llama4TextConfig(**MORE, intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1),
    "qwen3_moe": Qwen3MoeConfig(**MORE, **EXPERTS, num_experts=4),
}
TOGETHER = {
    "bloom (ALiBi)": BLOOM,
    "bamba (state spaces)": BambaConfig(**SMALL, **STATE_SPACE, attn_layer_indices=[1]),
    "falcon_h1 (state spaces, and scales its logits)": FalconH1Config(
        **MORE, **STATE_SPACE, mamba_d_ssm=64, lm_head_multiplier=0.5
    ),
    "gpt_oss (positions do not reach the masks)": GptOssConfig(**MORE, num_local_experts=4, num_experts_per_tok=2),
    "lfm2 (convolutions)": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "opt (its own positions)": OPTConfig(
        vocab_size=262, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32
    ),
    "qwen3_next (linear attention)": Qwen3NextConfig(
        **{**MORE, **EXPERTS, **LINEAR}, num_experts=4, shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip
IMAGES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GEMMA3 = Gemma3Config(
    text_config={**MORE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    vision_config={**IMAGES, "image_size": 28, "patch_size": 14},
    mm_tokens_per_image=4, image_token_index=259, boi_token_index=260, eoi_token_index=261,
    eos_token_id=1, pad_token_id=0, bos_token_id=None,
)  # fmt: skip


def apart(config: Any) -> bool:
    torch.manual_seed(0)
    loss = TrainedTokenLoss(AutoModelForCausalLM.from_config(config))
    return keeps_documents_apart(loss, loss, torch.randint(6, 250, (1, 64)), "fp32")


def train_here(base: Path, data: Path, place: Path, **training: Any) -> Trainer:
    """Train in this process."""
    recipe = TrainingRecipe.model_validate(
        {"global_batch_size": 8, "epochs": 0.5, "learning_rate": 0.01, "precision": "fp32", **training}
    )
    job = TrainingJob(data, LocalBase(str(base)), ModelRecipe(base=str(base)), recipe, place / "checkpoints")
    trainer = Trainer(Rank(0, 1, torch.device("cpu")), job)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", APART)
def test_most_models_keep_documents_apart(name: str) -> None:
    assert apart(APART[name])


# https://github.com/huggingface/transformers/issues/46093 and https://github.com/huggingface/blog/issues/2307
@pytest.mark.parametrize("name", TOGETHER)
def test_some_models_read_across_documents(name: str) -> None:
    assert not apart(TOGETHER[name])


def test_a_model_that_computes_its_logits_in_another_way_is_rejected() -> None:
    config = LlamaConfig(**SMALL, final_logit_softcapping=1.0)  # which Llama ignores
    with pytest.raises(ForgeError, match=r"base model of class LlamaForCausalLM: its own loss of 32 tokens is \d"):
        apart(config)


def test_a_model_that_reads_across_documents_is_trained_on_one_at_a_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, data = write_base(BLOOM, tmp_path / "base"), write_data(tmp_path / "data")
    trainer = train_here(base, data, tmp_path, micro_batch_size=2)
    assert "BloomForCausalLM reads across documents in a packed row" in caplog.text
    rows = trainer.sampler.rows_of(0)
    plain = AutoModelForCausalLM.from_pretrained(base)
    total = trained = 0.0
    for row, begin, end in trainer.rows.spans(rows, packed=False).tolist():
        tokens, mask = (np.load(data / f"train/00000/{name}.npy")[row, begin:end] for name in ("tokens", "trained"))
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(mask), IGNORED)
        if mask[1:].any():  # otherwise its mean is NaN
            total += plain(input_ids=ids, labels=labels).loss.item() * mask[1:].sum()
            trained += mask[1:].sum()
    assert trainer.state.curve[0]["loss"] == pytest.approx(total / trained, rel=1e-5)


def test_padding_is_no_leak(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The embedding of the padding token is zero in a model that is trained from scratch."""
    base, data = write_base(CONFIGS["llama"], tmp_path / "base"), write_data(tmp_path / "data")
    assert AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight[0].norm() == 0
    assert (np.load(data / "train/00000/document.npy")[0] == 0).any()
    assert train_here(base, data, tmp_path).packed
    assert "reads across" not in caplog.text


def test_confident_predictions_do_not_fail_the_check_of_the_loss() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.lm_head.weight[7] = 1e-4
        model.model.norm.weight.mul_(1e5)
    loss = TrainedTokenLoss(model)
    assert keeps_documents_apart(loss, loss, torch.full((1, 64), 7), "fp32")


def test_documents_one_by_one_are_all_documents_once(tmp_path: Path) -> None:
    rows = PackedRows(write_data(tmp_path / "data") / "train")
    numbers = np.arange(len(rows))
    spans = rows.spans(numbers, packed=False)
    assert (spans[:, 2] - spans[:, 1]).sum() == rows.all_tokens.sum()
    lengths = spans[:, 2] - spans[:, 1]
    assert (np.diff(lengths) <= 0).all()
    assert len(np.unique(spans, axis=0)) == len(spans)
    packed = rows.batch(rows.spans(numbers, packed=True))
    alone = rows.batch(spans)
    assert (alone.targets != IGNORED).sum() == (packed.targets != IGNORED).sum()
    assert sorted(alone.targets[alone.targets != IGNORED]) == sorted(packed.targets[packed.targets != IGNORED])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_documents_in_as_many_passes(tmp_path: Path, world_size: int) -> None:
    rows = PackedRows(write_data(tmp_path / "data") / "train")
    spans = rows.spans(np.arange(6), packed=False)
    shares = [list(micro_batches(spans, 2 * CONTEXT, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    taken = np.concatenate([part for share in shares for part, takes_part in share if takes_part])
    assert sorted(map(tuple, taken)) == sorted(map(tuple, spans))
    for share in shares:
        for part, _ in share:
            assert len(part) * (part[:, 2] - part[:, 1]).max() <= 2 * CONTEXT


def test_fewer_rows_than_a_batch_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, data = write_base(CONFIGS["llama"], tmp_path / "base"), write_data(tmp_path / "data", rows=3)
    train_here(base, data, tmp_path, global_batch_size=12)
    assert (
        "the data set has 3 packed rows, fewer than training.global_batch_size (12), so each step reads a row 4 times"
        in caplog.text
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "training"),
    [
        pytest.param(BLOOM, {}, id="one document at a time"),
        pytest.param(APART["qwen3_moe"], {"method": "lora", "lora": {"rank": 2}}, id="experts, grouped by the model"),
        # https://github.com/huggingface/trl/issues/5032
        pytest.param(GEMMA3, {"parallelism": "ddp"}, id="reads images"),
    ],
)
def test_two_processes_train_like_one(config: Any, training: dict[str, Any], tmp_path: Path) -> None:
    base, data = write_base(config, tmp_path / "base"), write_data(tmp_path / "data")
    changes = {"micro_batch_size": 2, "epochs": 0.5, **training}
    one = train_here(base, data, tmp_path, **{**changes, "parallelism": "auto"}).state.curve
    recipe = write_recipe(tmp_path / "recipe.yaml", base, nproc_per_node=2, **{"parallelism": "fsdp", **changes})
    run(recipe, data, tmp_path / "two", 2)
    two = curve(tmp_path / "two")
    assert [point["loss"] for point in one] == pytest.approx([point["loss"] for point in two], rel=1e-4)
    assert one[-1]["heldout_loss"] == pytest.approx(two[-1]["heldout_loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_texts_train_the_text_side_of_a_model_that_reads_images(method: str, tmp_path: Path) -> None:
    base, data = write_base(GEMMA3, tmp_path / "base"), write_data(tmp_path / "data")
    trainer = train_here(base, data, tmp_path, method=method, **({"lora": {"rank": 2}} if method == "lora" else {}))
    export(trainer, tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (base, tmp_path / "out/model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("vision" not in name and "projector" not in name for name in changed)
    if method == "lora":
        adapted = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
        assert all("language_model" in name for name in adapted)
