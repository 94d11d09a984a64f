"""The model: built from an architecture or loaded from a base model, and the loss on trained tokens."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from tasks.contracts import Base
from tasks.errors import ForgeError
from tasks.finetune.data import IGNORED, Batch
from tasks.recipe import ModelRecipe


def build_model(recipe: ModelRecipe, base: Base, tokenizer: Any, context: int, seed: int) -> Any:
    """A causal language model in fp32: new weights for an architecture (the same for a seed), else the base's."""
    torch.manual_seed(seed)
    if recipe.architecture is not None:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.architecture.hidden_size,
            intermediate_size=recipe.architecture.intermediate_size,
            num_hidden_layers=recipe.architecture.layers,
            num_attention_heads=recipe.architecture.heads,
            num_key_value_heads=recipe.architecture.heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    try:
        return AutoModelForCausalLM.from_pretrained(
            base.location,
            revision=base.revision,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ForgeError(f"base model {base.location}: cannot be loaded: {str(error).splitlines()[0]}") from None


class TrainedTokenLoss(nn.Module):
    """Cross entropy summed over the trained tokens of a batch (a scalar, nats).

    Logits are made for the places that have a target alone: most places of a chat have none.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """Run the model on a batch of packed rows."""
        hidden = self.model.base_model(
            input_ids=batch.tokens, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        trained = batch.targets != IGNORED
        logits = self.model.get_output_embeddings()(hidden[trained]).float()
        return functional.cross_entropy(logits, batch.targets[trained], reduction="sum")
