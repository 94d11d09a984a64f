"""Hugging Face's Trainer, in .venv-trl: documents padded to the longest of their batch. Run as trl_side is."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from benchmarks.finetune.data import IGNORED, documents
from benchmarks.finetune.shapes import SHAPES
from benchmarks.finetune.watched import attention, save_model, train_watched, training_arguments, weights_dtype

PADDED_TO = 128  # tokens


def main(
    model: str,
    base: str,
    dataset: str,
    precision: str,
    steps: int,
    per_step: int,
    batch: int,
    compiled: bool,
    out: str,
    folder: str,
) -> dict[str, Any]:
    """Train with `per_step` documents a step, `batch` at a time; times, tokens, and the settings in force."""
    shape = SHAPES[model]
    train = Dataset.from_dict(documents(Path(dataset, "train")))
    started = time.time()
    settings = training_arguments(shape, precision, steps, batch, per_step) | {"torch_compile": compiled}
    causal: Any = AutoModelForCausalLM.from_pretrained(
        base, attn_implementation=attention(), dtype=weights_dtype(shape)
    )
    if shape.lora:
        from peft import get_peft_model

        from benchmarks.finetune.trl_side import lora

        causal = get_peft_model(causal, lora())
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = Trainer(
        causal,
        args=TrainingArguments(output_dir=folder, **settings),
        train_dataset=train,
        processing_class=tokenizer,
        # Lengths of few kinds where it compiles: for each other one it would do so again.
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=PADDED_TO if compiled else None
        ),
    )
    found = train_watched(trainer, steps, started)
    save_model(trainer, out)
    return found | {"settings": settings, "versions": {name: version(name) for name in ("transformers", "torch")}}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["folder"], "result.json").write_text(json.dumps(main(**arguments)))
