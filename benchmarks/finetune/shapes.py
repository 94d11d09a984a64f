"""The models that are trained, with random weights, and the training of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20
VOCABULARY = 4096  # of the tokenizer; a model may have embeddings for more


@dataclass(frozen=True)
class Shape:
    """A Llama model (https://arxiv.org/abs/2407.21783, table 3) and its training, the same on every side."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool  # input and output embeddings share one matrix
    context: int
    rows: int  # conversations, trained for one epoch
    global_batch_size: int
    micro_batch_size: int  # of Forge; TRL tries it too, on a GPU
    learning_rate: float
    lora: bool = False  # train an adapter of rank 16 on a base in bf16


LORA: dict[str, Any] = {"rank": 16, "alpha": 32, "dropout": 0.0}
# Training settings that all models share.
WARMUP, WEIGHT_DECAY, BETAS, CLIP = 0.1, 0.01, (0.9, 0.95), 1.0

SHAPES = {
    "tiny": Shape(
        hidden=256,
        layers=6,
        intermediate=1024,
        heads=4,
        key_value_heads=4,
        vocabulary=VOCABULARY,
        tied=True,
        context=512,
        rows=700,
        global_batch_size=8,
        micro_batch_size=8,
        learning_rate=1e-3,
    ),
    "llama-1b": Shape(  # Llama 3.2 1B
        hidden=2048,
        layers=16,
        intermediate=8192,
        heads=32,
        key_value_heads=8,
        vocabulary=128_256,
        tied=True,
        context=2048,
        rows=4_000,
        global_batch_size=16,
        micro_batch_size=4,
        learning_rate=1e-4,
    ),
    "llama-8b-lora": Shape(  # Llama 3.1 8B
        hidden=4096,
        layers=32,
        intermediate=14_336,
        heads=32,
        key_value_heads=8,
        vocabulary=128_256,
        tied=False,
        context=2048,
        rows=2_000,
        global_batch_size=8,
        micro_batch_size=2,
        learning_rate=2e-4,
        lora=True,
    ),
}


def write_model(shape: Shape, directory: Path) -> int:
    """Save random weights in Hugging Face format (safetensors); returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        # The tokenizer's <|begin_of_text|>, and <|eot_id|>, which is also the padding token.
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(SEED)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if shape.lora else torch.float32)
    model.save_pretrained(directory)
    return int(model.num_parameters())
