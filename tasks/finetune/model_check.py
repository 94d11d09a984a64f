"""What training assumes of a model, checked by running it before the first step.

Packing assumes that the documents of a row are kept apart. Most models in transformers do so, since they mask attention
where positions restart. Others read on, such as those with linear attention, convolutions, state spaces or ALiBi, and
some that never pass the positions to their masks.

The loss assumes that logits are the output layer's, scaled and capped in the ways that it knows.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from forge.core.errors import ForgeError
from tasks.finetune.data import IGNORED, Batch, positions
from tasks.finetune.loss import LAST, TrainedTokenLoss

# What rounding may change: hidden states relative to their size, and the loss in nats per token or relative to it.
HIDDEN_TOLERANCE = {"fp32": 1e-3, "bf16": 0.03}
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
OTHER = "choose a model of another architecture"


@torch.no_grad()
def keeps_documents_apart(loss: nn.Module, model_loss: TrainedTokenLoss, tokens: torch.Tensor, precision: str) -> bool:
    """Whether a document's hidden states stay the same when another one is packed before it.

    `loss` is `model_loss` as training calls it, distributed and compiled. `tokens` are any that the model knows, int64
    [rows, context]: two documents are made of each row, and packed in both orders.

    Raises ForgeError if the model cannot be called as training does, or computes another loss.
    """
    name = type(model_loss.model).__name__
    hidden: list[torch.Tensor] = []
    hook = model_loss.decoder.register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state.float()))
    half = tokens.shape[1] // 2
    documents = tokens[:, :half], tokens[:, half:].flip(1)
    loss.eval()
    try:
        for one, other in (documents, documents[::-1]):
            batch = _packed(one, other)
            ours = loss(batch)
        theirs = loss(batch, by_model=True)
    except (TypeError, AttributeError) as error:
        raise ForgeError(
            f"cannot be called as training does: {error}", where=f"base model of class {name}", fix=OTHER
        ) from None
    finally:
        hook.remove()
        if isinstance(loss, FSDPModule):
            loss.reshard()  # the optimizer needs the sharded weights
    predicted = (batch.targets != IGNORED).sum()  # of confident predictions, only rounding is left
    if (ours - theirs).abs() > LOSS_TOLERANCE[precision] * torch.maximum(theirs.abs(), predicted):
        raise ForgeError(
            f"its own loss of {LAST} tokens is {theirs.item():.4f}, and training computes {ours.item():.4f}, so its "
            "logits are not those of its output layer",
            where=f"base model of class {name}",
            fix=OTHER,
        )
    behind, alone = hidden[0][:, half:], hidden[1][:, : tokens.shape[1] - half]
    difference = (behind - alone).norm(dim=-1).mean() / alone.norm(dim=-1).mean()
    return bool(difference <= HIDDEN_TOLERANCE[precision])


def _packed(one: torch.Tensor, other: torch.Tensor) -> Batch:
    """Two documents in each row; the last tokens are to be predicted."""
    number = torch.cat([torch.full_like(one, 1), torch.full_like(other, 2)], dim=1)
    tokens = torch.cat([one, other], dim=1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:]
    targets[:, :-LAST] = IGNORED
    return Batch(tokens, positions(number), targets)
