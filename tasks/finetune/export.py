"""What training leaves: a model in Hugging Face format, the adapter if there is one, and the card."""

import json
import platform
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tasks.contracts import Base
from tasks.finetune.model import DTYPES, build_model
from tasks.finetune.train import Trainer
from tasks.storage.digest import digest_directory
from tasks.storage.lease import whoami
from tasks.version import code_version

CARD = "training.json"
SHARD = "5GB"  # of a safetensors file


def export(trainer: Trainer, directory: Path | None) -> None:
    """Write the trained model into a directory. Every rank calls it; the first one's directory is written to.

    `model/` holds safetensors in the recipe's precision with tokenizer and generation config, `adapter/` what LoRA
    trained (then `model/` is the base with the adapter merged into it), `base/` the random weights that training from
    scratch started from, `training.json` the recipe, the loss curve, the speed and the versions.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainer.adapter is not None)
    weights = get_model_state_dict(trainer.causal, options=options)
    if directory is None:
        return
    job = trainer.job
    dtype = DTYPES[job.training.precision]
    if trainer.adapter is not None:
        named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
        trainer.adapter.save_pretrained(directory / "adapter", state_dict=named)
        base = build_model(job.model, job.base, trainer.tokenizer, trainer.context, job.training.seed, torch.float32)
        merged = PeftModel.from_pretrained(base, str(directory / "adapter")).merge_and_unload()
        save(merged, merged.state_dict(), dtype, trainer.tokenizer, directory / "model")
    else:
        save(trainer.causal, weights, dtype, trainer.tokenizer, directory / "model")
    if job.model.architecture is not None:
        base = build_model(job.model, job.base, trainer.tokenizer, trainer.context, job.training.seed, torch.float32)
        save(base, base.state_dict(), torch.float32, trainer.tokenizer, directory / "base")
    digest, _ = digest_directory(directory)
    (directory / CARD).write_text(json.dumps(card(trainer, digest), indent=2) + "\n")


def save(causal: Any, weights: dict[str, Any], dtype: torch.dtype, tokenizer: Any, directory: Path) -> None:
    """Write weights, configuration and tokenizer in Hugging Face format."""
    tied = set(causal.all_tied_weights_keys or ())
    kept = {name: weight.to(dtype).contiguous() for name, weight in weights.items() if name not in tied}
    causal.save_pretrained(directory, state_dict=kept, max_shard_size=SHARD)
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"  # which has the dtype that the weights had while they were trained
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")


def card(trainer: Trainer, digest: str) -> dict[str, Any]:
    """What the model was made from, and how it went."""
    job, facts = trainer.job, trainer.facts
    flops_per_token, peak = trainer.flops()
    dataset = json.loads((job.data / "dataset.json").read_text())
    return {
        "kind": "model",
        "digest": digest,
        "base": (job.base if job.base.location else Base(location="random weights")).model_dump(),
        "dataset": {"digest": dataset["digest"]},
        "parameters": trainer.parameters,
        "recipe": {"model": job.model.model_dump(mode="json"), "training": job.training.model_dump(mode="json")},
        "steps": facts.step,
        "best_step": facts.best_step if job.training.early_stopping else None,
        "skipped_steps": facts.skipped,
        "curve": facts.curve,
        "tokens_per_second": round(trainer.tokens_per_second()),
        "mfu": round(trainer.tokens_per_second() * flops_per_token / peak, 4),
        "seconds": round(time.monotonic() - trainer.started, 1),
        "seconds_to_first_step": round(trainer.seconds_to_first_step, 2),
        "made_by": whoami(),
        "versions": {
            "forge": code_version("finetune"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
    }
