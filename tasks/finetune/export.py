"""Export a trained model: Hugging Face format, the adapter if there is one, and a card."""

import importlib.metadata
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from forge.core.code_version import code_version
from forge.core.contracts import Base
from forge.core.digest import digest_directory
from forge.core.full_disk import DiskFull, explain_full_disk
from forge.models.hub import GENERATION_CONFIG
from forge.models.weights import merge, save
from forge.registry.packages import portable_name
from forge.storage.lease import current_owner
from tasks.finetune.model import DTYPES, build_model
from tasks.finetune.train import Trainer

CARD = "training.json"


def export(trainer: Trainer, directory: Path | None) -> None:
    """Write the trained model into a directory. Every rank calls it, all but the first with None.

    `model/` holds safetensors in the recipe's precision with tokenizer and generation config. With LoRA, `adapter/` is
    the adapter and `model/` the base with the adapter merged. `base/` holds the random weights that training from
    scratch started from, and `training.json` the recipe, the loss curve, the speed and the versions.

    Raises DiskFull if there is no room for them; the directory is then removed.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainer.adapter is not None)
    weights = get_model_state_dict(trainer.model, options=options)
    if directory is None:
        return
    dtype = DTYPES[trainer.job.training.precision]
    try:
        with explain_full_disk(directory, "the trained model", trainer.parameters * dtype.itemsize):
            _write(trainer, weights, dtype, directory)
    except DiskFull:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _write(trainer: Trainer, weights: dict[str, Any], dtype: torch.dtype, directory: Path) -> None:
    """Write what `export` describes."""
    job = trainer.job
    ends = sorted(trainer.tokenizer.convert_tokens_to_ids(trainer.end_tokens))
    if trainer.adapter is not None:
        save_adapter(trainer.adapter, weights, job.origin, ends, directory / "adapter")
        merge(job.base, directory / "adapter", dtype, directory / "model", trainer.tokenizer)
    else:
        save(trainer.model, weights, dtype, trainer.tokenizer, directory / "model", ends)
    if job.model.architecture is not None:
        base = build_model(job.model, job.base, trainer.tokenizer, trainer.context, job.training.seed, torch.float32)
        save(base, base.state_dict(), torch.float32, trainer.tokenizer, directory / "base")
    digest, _ = digest_directory(directory)
    (directory / CARD).write_text(json.dumps(card(trainer, digest), indent=2) + "\n", encoding="utf-8")


def save_adapter(adapter: Any, weights: dict[str, Any], base: Base, ends: list[int], directory: Path) -> None:
    """Write an adapter as peft does, but reproducibly and without local paths; and the end tokens it has learned."""
    named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    adapter.save_pretrained(directory, state_dict=named)
    (directory / "README.md").unlink()  # it names the base's local path; registration writes its own
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": portable_name(base), "target_modules": sorted(config["target_modules"])}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": ends}) + "\n", encoding="utf-8")


def card(trainer: Trainer, digest: str) -> dict[str, Any]:
    """The training card: inputs, result and speed of a run."""
    job, state = trainer.job, trainer.state
    flops_per_token, peak_flops = trainer.flops()
    dataset = json.loads((job.data / "dataset.json").read_text(encoding="utf-8"))
    return {
        "kind": "model",
        "digest": digest,
        "base": (job.origin if job.base.location else Base(location="random weights")).model_dump(),
        "dataset": {"digest": dataset["digest"]},
        "parameters": trainer.parameters,
        "recipe": {"model": job.model.model_dump(mode="json"), "training": job.training.model_dump(mode="json")},
        "steps": state.step,
        "best_step": state.best_step if job.training.early_stopping_patience else None,
        "skipped_steps": state.skipped,
        "packed": trainer.packed,
        "curve": state.curve,
        "tokens_per_second": round(trainer.tokens_per_second()),
        "mfu": round(trainer.tokens_per_second() * flops_per_token / peak_flops, 4),
        "seconds": round(time.monotonic() - trainer.started, 1),
        "seconds_to_first_step": round(trainer.seconds_to_first_step, 2),
        "made_by": current_owner(),
        "versions": {
            "forge": code_version("tasks.finetune"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": importlib.metadata.version("peft"),
            "python": platform.python_version(),
        },
    }
