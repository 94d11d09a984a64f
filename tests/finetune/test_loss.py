"""The loss equals that of transformers, for every architecture, packed or not."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from forge.core.errors import ForgeError
from forge.core.recipe import Lora, ModelRecipe
from forge.registry.packages import LocalBase
from tasks.finetune.data import PackedRows
from tasks.finetune.loss import LinearCrossEntropy, TrainedTokenLoss
from tasks.finetune.model import add_adapter, build_model
from tests.finetune.job import CONFIGS, CONTEXT, write_base, write_data


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_loss_and_gradients_equal_unchunked_ones(softcap: float | None, with_bias: bool) -> None:
    torch.manual_seed(0)
    tokens, hidden_size, vocabulary = 600, 16, 50  # three chunks
    targets = torch.randint(0, vocabulary, (tokens,))
    expected, actual = [], []
    leaves = torch.randn(tokens, hidden_size), torch.randn(vocabulary, hidden_size), torch.randn(vocabulary)
    for results, chunked in ((expected, False), (actual, True)):
        hidden, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        if chunked:
            loss = LinearCrossEntropy.apply(hidden, weight, bias if with_bias else None, targets, softcap, 0.5)
        else:
            logits = 0.5 * functional.linear(hidden, weight, bias if with_bias else None)
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            loss = functional.cross_entropy(logits, targets, reduction="sum")
        (loss / 7).backward()
        results += [loss, hidden.grad, weight.grad, *([bias.grad] if with_bias else [])]
    for want, have in zip(expected, actual, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_loss_is_summed_in_fp32_under_bf16() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2000, 16), torch.randn(64, 16)
    targets = torch.randint(0, 64, (2000,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = LinearCrossEntropy.apply(hidden, weight, None, targets, None, 1.0)
    exact = functional.cross_entropy(functional.linear(hidden, weight), targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_packed_rows_have_the_loss_of_their_separate_documents(architecture: str, tmp_path: Path) -> None:
    base = write_base(CONFIGS[architecture], tmp_path / architecture)
    rows = PackedRows(write_data(tmp_path / "data") / "train")
    model = build_model(ModelRecipe(base=str(base)), LocalBase(str(base)), None, CONTEXT, 0, torch.float32)
    batch = rows.batch(rows.spans(np.arange(3), packed=True))
    packed = TrainedTokenLoss(model)(batch)
    packed.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    plain = AutoModelForCausalLM.from_pretrained(base)
    alone = torch.zeros(())
    for tokens, positions, targets in zip(batch.tokens, batch.positions, batch.targets, strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), CONTEXT]
        for begin, end in pairwise(starts):
            logits = plain(input_ids=tokens[None, begin:end]).logits[0]
            alone = alone + functional.cross_entropy(logits, targets[begin:end], reduction="sum", ignore_index=-100)
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_adapter_on_the_output_layer_is_an_error(tmp_path: Path) -> None:
    base = write_base(CONFIGS["llama"], tmp_path / "base")
    model = build_model(ModelRecipe(base=str(base)), LocalBase(str(base)), None, CONTEXT, 0, torch.float32)
    add_adapter(model, Lora(target_modules=["lm_head"]), seed=0)
    with pytest.raises(ForgeError, match="target_modules names the output layer"):
        TrainedTokenLoss(model)


def test_unknown_target_modules_are_an_error(tmp_path: Path) -> None:
    base = write_base(CONFIGS["llama"], tmp_path / "base")
    model = build_model(ModelRecipe(base=str(base)), LocalBase(str(base)), None, CONTEXT, 0, torch.float32)
    with pytest.raises(ForgeError, match=r"training\.lora\.target_modules"):
        add_adapter(model, Lora(target_modules=["nothing_like_it"]), seed=0)
