"""TRL's side, in .venv-trl: SFTTrainer with its best settings. Its argument is one JSON object.

The trainer packs the documents (best-fit decreasing, a thousand at a time). Its packed batch is one long row without
padding. Without FlashAttention a forward pass over eight rows of 512 attends over 4,096 x 4,096 positions, most of them
masked, so a micro batch of one row is faster.
"""

import importlib.util
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.finetune.data import documents
from benchmarks.finetune.peers import attention, save_model, train_timed, training_arguments, weights_dtype
from benchmarks.finetune.shapes import LORA, SHAPES


def main(
    model: str, base: str, dataset: str, precision: str, steps: int, batch: int, compiled: bool, out: str, folder: str
) -> dict[str, Any]:
    """Train; returns times, tokens and settings."""
    disable_progress_bars()
    shape = SHAPES[model]
    train = Dataset.from_dict(documents(Path(dataset, "train")))
    started = time.time()
    settings: dict[str, Any] = {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": shape.context,
        "torch_compile": compiled,
        # Rows of one length: each new length is compiled again, and dynamic shapes are no faster.
        "pad_to_multiple_of": shape.context if compiled else None,
        "use_liger_kernel": torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None,
        **training_arguments(shape, precision, steps, batch, shape.global_batch_size),
    }
    model_settings = {"attn_implementation": attention(), "dtype": weights_dtype(shape)}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, **model_settings),
        args=SFTConfig(output_dir=folder, **settings),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora() if shape.lora else None,
    )
    packed = len(trainer.train_dataset)
    result = train_timed(trainer, steps, started)
    save_model(trainer, out)
    names = ("trl", "transformers", "torch", "accelerate")
    return result | {
        "packed_rows": packed,
        "settings": settings | {name: str(value) for name, value in model_settings.items()},
        "versions": {name: version(name) for name in names},
    }


def lora() -> Any:
    """The same adapters as Forge's."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["folder"], "result.json").write_text(json.dumps(main(**arguments)))
