"""Hugging Face's side, in .venv-trl: Trainer with documents padded to the longest of their batch."""

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
from benchmarks.finetune.peers import attention, save_model, train_timed, training_arguments, weights_dtype
from benchmarks.finetune.shapes import SHAPES

PAD_TO_MULTIPLE = 128  # tokens


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
    """Train with `per_step` documents per step in micro batches of `batch`; returns times, tokens and settings."""
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
        # Few distinct lengths if it compiles: each new length is compiled again.
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=PAD_TO_MULTIPLE if compiled else None
        ),
    )
    result = train_timed(trainer, steps, started)
    save_model(trainer, out)
    return result | {"settings": settings, "versions": {name: version(name) for name in ("transformers", "torch")}}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["folder"], "result.json").write_text(json.dumps(main(**arguments)))
