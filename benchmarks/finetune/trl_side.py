"""TRL's side, in .venv-trl: SFTTrainer at its best settings. Run with its arguments as one JSON object.

The documents are packed by the trainer (best-fit decreasing, a thousand at a time). Its packed batch is one long row
without padding: without FlashAttention a forward of eight rows of 512 attends over 4,096 x 4,096 places, most of them
masked, so a row at a time is the faster there.
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
from benchmarks.finetune.shapes import LORA, SHAPES
from benchmarks.finetune.watched import attention, save_model, train_watched, training_arguments, weights_dtype


def main(
    model: str, base: str, dataset: str, precision: str, steps: int, batch: int, compiled: bool, out: str, folder: str
) -> dict[str, Any]:
    """Train; times, tokens, and the settings that were in force."""
    disable_progress_bars()
    shape = SHAPES[model]
    train = Dataset.from_dict(documents(Path(dataset, "train")))
    started = time.time()
    settings: dict[str, Any] = {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": shape.context,
        "torch_compile": compiled,
        # Rows of one length: for each other one it compiles again, and what it makes of any length is no faster.
        "pad_to_multiple_of": shape.context if compiled else None,
        "use_liger_kernel": torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None,
        **training_arguments(shape, precision, steps, batch, shape.global_batch_size),
    }
    used = {"attn_implementation": attention(), "dtype": weights_dtype(shape)}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, **used),
        args=SFTConfig(output_dir=folder, **settings),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora() if shape.lora else None,
    )
    packed = len(trainer.train_dataset)
    found = train_watched(trainer, steps, started)
    save_model(trainer, out)
    names = ("trl", "transformers", "torch", "accelerate")
    return found | {
        "packed_rows": packed,
        "settings": settings | {name: str(value) for name, value in used.items()},
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
