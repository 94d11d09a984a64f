"""Forge's side: runs `python -m tasks.finetune`. Its argument is one JSON object."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.finetune.shapes import CLIP, LORA, SHAPES, WARMUP, WEIGHT_DECAY


def main(model: str, base: str, dataset: str, precision: str, compiled: bool, out: str, folder: str) -> dict[str, Any]:
    """Train; returns, for each step, the seconds since the start of the first and the tokens up to its end."""
    path = Path(folder, "recipe.yaml")
    path.write_text(yaml.safe_dump(recipe(model, base, precision, compiled)))
    command = [sys.executable, "-m", "tasks.finetune", "--recipe", str(path), "--data", dataset, "--out", out]
    subprocess.run(command, check=True)
    card = json.loads(Path(out, "training.json").read_text())
    return {
        "steps": [[point["step"], point["tokens"], point["seconds"]] for point in card["curve"]],
        "seconds_to_first_step": card["seconds_to_first_step"],
        "mfu": card["mfu"],
    }


def recipe(model: str, base: str, precision: str, compiled: bool, **training: Any) -> dict[str, Any]:
    """The recipe, as in YAML."""
    shape = SHAPES[model]
    return {
        "name": "benchmark",
        "data": {"max_seq_len": shape.context, "overlong": "split"},
        "model": {"base": base},
        "training": {
            "method": "lora" if shape.lora else "full",
            **({"lora": LORA} if shape.lora else {}),
            "global_batch_size": shape.global_batch_size,
            "micro_batch_size": shape.micro_batch_size,
            "epochs": 1,
            "learning_rate": shape.learning_rate,
            "warmup_ratio": WARMUP,
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": CLIP,
            "precision": precision,
            "compile": compiled,
            **training,
        },
        "evaluation": {"max_new_tokens": 16},
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["folder"], "result.json").write_text(json.dumps(main(**arguments)))
