"""The loss: cross entropy on trained tokens, without materialising all logits."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from forge.capacity.training_memory import LOSS_CHUNK
from forge.core.errors import ForgeError
from tasks.finetune.data import IGNORED, Batch

LAST = 32  # positions whose logits the model computes itself, to check the loss


class TrainedTokenLoss(nn.Module):
    """Cross entropy summed over the trained tokens of a batch (a scalar, nats)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        # Three names of one thing: Cohere's and Falcon-H1's multiply the logits, Granite's divides them.
        scales = (getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier"))
        self.scale = math.prod(float(scale) for scale in scales if isinstance(scale, int | float))
        self.scale /= getattr(config, "logits_scaling", None) or 1.0
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ForgeError(
                "training.lora.target_modules names the output layer, which Forge cannot adapt yet", fix="leave it out"
            )

    @property
    def decoder(self) -> Any:
        """The model without its output layer. Of those that are their own `base_model`, it is the part below."""
        return self.model.model if self.model.base_model is self.model else self.model.base_model

    def forward(self, batch: Batch, by_model: bool = False) -> torch.Tensor:
        """The loss of a batch; `by_model` takes the model's own logits, which only LAST positions have targets for."""
        if by_model:
            logits = self.model(
                input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, logits_to_keep=LAST
            ).logits[:, -LAST:]
            targets = batch.targets[:, -LAST:]
            return functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
            )
        hidden = self.decoder(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).last_hidden_state
        trained = batch.targets != IGNORED
        head = self.model.get_output_embeddings()
        loss: torch.Tensor = LinearCrossEntropy.apply(
            hidden[trained], head.weight, head.bias, batch.targets[trained], self.softcap, self.scale
        )
        return loss


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of a linear layer's outputs, computed for a chunk of tokens at a time.

    The forward pass also computes the gradients, while it has the logits (as in https://arxiv.org/abs/2410.10989), so
    that logits are neither kept nor recomputed. torch.nn.functional.linear_cross_entropy does the same, but sums the
    loss in bfloat16 if the inputs are, and does not support capped logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        scale: float,
    ) -> torch.Tensor:
        """Shapes: hidden [tokens, size], weight [vocabulary, size], bias [vocabulary], targets [tokens]."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            hidden_gradient = torch.empty_like(hidden)
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            bias_gradient = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
            total = torch.zeros((), device=hidden.device)
            tokens = LOSS_CHUNK.get(device, LOSS_CHUNK["cuda"])
            for begin in range(0, len(hidden), tokens):
                chunk = slice(begin, begin + tokens)
                inputs, target = hidden[chunk].to(dtype), targets[chunk, None]
                logits = (inputs @ matrix.T).float()
                if bias is not None:
                    logits += bias
                if scale != 1:
                    logits *= scale
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                slope = 1 - (logits / softcap) ** 2 if softcap else None
                normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
                total += (normaliser - logits.gather(1, target)).sum()
                gradient = logits.sub_(normaliser).exp_()  # softmax, minus one at the target
                gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
                if slope is not None:
                    gradient *= slope
                if scale != 1:
                    gradient *= scale
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(dim=0)
                gradient = gradient.to(dtype)
                hidden_gradient[chunk] = gradient @ matrix
                if weight_gradient is not None:
                    weight_gradient += gradient.T @ inputs
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients of the forward pass."""
        (scale,) = gradients
        hidden, weight, bias = ctx.saved_tensors
        return (
            (hidden * scale).to(hidden.dtype),
            None if weight is None else weight.mul_(scale).to(ctx.dtypes[0]),
            None if bias is None else bias.mul_(scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )
