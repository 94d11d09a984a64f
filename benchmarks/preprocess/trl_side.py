"""TRL's side, in .venv-trl: run as `python -m benchmarks.preprocess.trl_side ARGUMENTS` (a JSON object).

Timed: `load_dataset("json")`, and `SFTTrainer._prepare_dataset` with its maps (chat template, tokenising, labels) and
packing. Not timed: imports, the model and the rest of the trainer.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from benchmarks.preprocess.timer import Timer


def main(rows: str, tokenizer: str, context: int, strategy: str, processes: int | None, folder: str) -> dict[str, Any]:
    """Prepare the rows with the trainer; returns seconds, and the tokens before and after packing.

    `parts` are what the packed rows consist of: documents, and the pieces of those that the strategy cuts.
    """
    disable_progress_bars()
    timer = Timer()
    seen: dict[str, Any] = {}
    prepare, pack = SFTTrainer._prepare_dataset, sft_trainer.pack_dataset

    def timed_prepare(*args: Any, **kwargs: Any) -> Dataset:
        with timer:
            seen["packed"] = prepare(*args, **kwargs)
        return seen["packed"]

    def recording_pack(dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        seen["documents"] = dataset
        return pack(dataset, *args, **kwargs)

    SFTTrainer._prepare_dataset, sft_trainer.pack_dataset = timed_prepare, recording_pack
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    tiny = LlamaConfig(
        vocab_size=len(loaded), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(tiny)
    settings: dict[str, Any] = {
        "packing": True,
        "packing_strategy": strategy,
        "assistant_only_loss": True,
        "dataset_num_proc": processes,
    }
    config = SFTConfig(
        output_dir=str(Path(folder, "output")), max_length=context, report_to=[], use_cpu=True, bf16=False, **settings
    )
    with timer:
        dataset = load_dataset("json", data_files=rows, split="train")
    SFTTrainer(model, args=config, train_dataset=dataset, processing_class=loaded)
    return {
        "seconds": timer.seconds,
        "cpu_seconds": timer.cpu_seconds,
        "documents": len(seen["documents"]),
        "tokens": count_tokens(seen["packed"]),
        "tokens_before": count_tokens(seen["documents"]),
        "trained_tokens": count_trained(seen["packed"]),
        "trained_tokens_before": count_trained(seen["documents"]),
        "packed_rows": len(seen["packed"]),
        "parts": count_tokens(seen["packed"], "seq_lengths"),
        "settings": settings,
        "versions": {name: version(name) for name in ("trl", "datasets", "tokenizers", "transformers")},
    }


def count_tokens(dataset: Dataset, column: str = "input_ids") -> int:
    """Tokens in a data set of TRL, or the entries of another column of lists."""
    batches = dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000)
    return sum(pc.sum(pc.list_value_length(batch[column])).as_py() for batch in batches)


def count_trained(dataset: Dataset) -> int:
    """Trained tokens in a data set of TRL."""
    batches = dataset.select_columns("labels").with_format("arrow").iter(batch_size=10_000)
    return sum(pc.sum(pc.not_equal(pc.list_flatten(batch["labels"]), -100)).as_py() for batch in batches)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["folder"], "result.json").write_text(json.dumps(main(**arguments)))
