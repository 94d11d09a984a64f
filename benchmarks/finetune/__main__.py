"""`python -m benchmarks.finetune`: Forge's training compared with TRL and Hugging Face. The last line is a JSON object.

docs/benchmarks.md explains what is measured, each side's settings, and the keys.
"""

import argparse
import itertools
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.finetune.data import card, prepare_dataset
from benchmarks.finetune.shapes import SHAPES, VOCABULARY, Shape, write_model
from benchmarks.generate import SEED, train_tokenizer, write_rows
from benchmarks.measure import PROJECT, SideFailed, run_side, say

TRL_PYTHON = PROJECT / ".venv-trl" / "bin" / "python"
WARM_UP = 10  # steps left out of the speed: compilation and first memory accesses
MIN_STEPS = 20  # timed


def main() -> int:
    """Create model and data, train on every side, and print the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description="Forge's training")
    parser.add_argument("--model", choices=SHAPES, default="tiny", help="size of the model (tiny)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["bf16", "fp32", "both"], default="both")
    parser.add_argument("--rows", type=int, help="conversations to train on, for one epoch (default: by model)")
    options = parser.parse_args()
    if not TRL_PYTHON.exists():
        parser.error("TRL's environment is not set up; run the benchmark with: make bench-finetune")
    if options.precision != "bf16" and SHAPES[options.model].lora:
        parser.error("adapters need a base in bf16: give --precision bf16")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        with tempfile.TemporaryDirectory(prefix="forge-benchmark-") as folder:
            benchmark = Benchmark(Path(folder), options.model, options.device, options.rows)
            result: dict[str, Any] = {}
            if options.precision != "fp32":
                result |= benchmark.compare("bf16")
            if options.precision != "bf16":
                result |= {f"fp32_{key}": value for key, value in benchmark.compare("fp32").items()}
            print(json.dumps(result | benchmark.context()))
    except SideFailed as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class Benchmark:
    """One model, one data set, and the training of every side on them."""

    def __init__(self, folder: Path, model: str, device: str, rows: int | None) -> None:
        self.folder, self.model, self.device = folder, model, device
        self.shape: Shape = SHAPES[model]
        self.base, path = folder / "base", folder / "rows.jsonl"
        say("generating rows")
        write_rows(path, rows=rows or self.shape.rows)
        train_tokenizer(path, self.base, VOCABULARY)
        say(f"writing random weights for {model}")
        self.parameters = write_model(self.shape, self.base)
        self.dataset = prepare_dataset(path, self.base, self.shape.context, folder / "store")
        self.card = card(self.dataset)
        self.steps = math.ceil(self.card["packed_rows"]["train"] / self.shape.global_batch_size)
        if self.steps < WARM_UP + MIN_STEPS:
            raise SideFailed(f"{self.steps} steps are too few to measure: give more --rows")
        self.versions: dict[str, str] = {}
        self.settings: dict[str, Any] = {}

    def compare(self, precision: str) -> dict[str, Any]:
        """Train every side in one precision; of TRL's and of Hugging Face's runs, the fastest counts."""
        sides = {"forge": self.run("forge", "forge_side", precision, compiled=True)}
        batches = {1, self.shape.micro_batch_size} if self.device == "cuda" else {1}
        for compiled in (True, False):
            how = ", compiled" * compiled
            for batch in sorted(batches):
                settings = {"steps": self.steps, "batch": batch, "compiled": compiled}
                sides[f"trl, batch {batch}{how}"] = self.run(
                    f"trl, batch {batch}{how}", "trl_side", precision, **settings
                )
            settings = {"steps": self.steps, "compiled": compiled, **self.documents_per_step()}
            sides[f"hf{how}"] = self.run(f"hf{how}", "hf_side", precision, **settings)
        trl, hf = fastest(sides, "trl"), fastest(sides, "hf")
        forge, tuned, padded = sides["forge"], sides[trl], sides[hf]
        losses = self.heldout_losses({"random": self.base} | {name: self.out(name, precision) for name in sides})
        self.versions = tuned["versions"]
        self.settings |= {f"trl_{precision}": tuned["settings"]}
        result = {
            "forge_tokens_per_s": forge["tokens_per_s"],
            "trl_tokens_per_s": tuned["tokens_per_s"],
            "hf_tokens_per_s": padded["tokens_per_s"],
            "ratio": round(forge["tokens_per_s"] / tuned["tokens_per_s"], 3),
            "ratio_to_hf": round(forge["tokens_per_s"] / padded["tokens_per_s"], 3),
            "loss_gap": round(abs(losses["forge"] / losses[trl] - 1), 5),
            "mfu": plausible_mfu(forge["mfu"]),
            "seconds_to_first_step": round(forge["seconds_to_first_step"], 2),
            "trl_seconds_to_first_step": round(tuned["seconds_to_first_step"], 2),
            "trl_settings": trl,
            "hf_settings": hf,
            "tokens_per_s": {name: side["tokens_per_s"] for name, side in sides.items()},
            "heldout_loss": {name: round(loss, 5) for name, loss in losses.items()},
            "tokens": {name: side["steps"][-1][1] for name, side in sides.items()},
        }
        for key in ("peak_rss_mb", "peak_gpu_mb", "other_cores"):
            of_side = {"": forge, "trl_": tuned, "hf_": padded}
            result |= {f"{prefix}{key}": side[key] for prefix, side in of_side.items() if key in side}
        say(f"{precision}: {json.dumps(result)}")
        return result

    def documents_per_step(self) -> dict[str, int]:
        """Documents per step with as many tokens as Forge's packed rows, and per micro batch.

        On a CPU a quarter of a step per micro batch is fastest: larger ones have more padding.
        """
        per_row = self.card["documents"]["train"] / self.card["packed_rows"]["train"]
        forwards = 4 if self.device == "cpu" else self.shape.global_batch_size // self.shape.micro_batch_size
        batch = max(1, round(per_row * self.shape.global_batch_size / forwards))
        return {"batch": batch, "per_step": batch * forwards}

    def run(self, name: str, side: str, precision: str, **settings: Any) -> dict[str, Any]:
        """Train one side; returns its result, with its speed after the warm-up."""
        say(f"{name}, {precision}: {self.steps} steps")
        common = {
            "model": self.model,
            "base": str(self.base),
            "dataset": str(self.dataset),
            "precision": precision,
            "out": str(self.out(name, precision).parent if side == "forge_side" else self.out(name, precision)),
        }
        python = Path(sys.executable) if side == "forge_side" else TRL_PYTHON
        result = run_side(python, f"finetune.{side}", self.folder / "side", common | settings, self.variables())
        steps = result["steps"]
        if steps[-1][0] != self.steps:
            raise SideFailed(f"{name} took {steps[-1][0]} steps instead of {self.steps}")
        result["tokens_per_s"] = round(speed(steps), 1)
        say(f"{name}, {precision}: {result['tokens_per_s']:,.0f} tokens/s")
        return result

    def out(self, name: str, precision: str) -> Path:
        """The directory of a side's model."""
        return self.folder / f"{name}, {precision}" / "model"

    def heldout_losses(self, models: dict[str, Path]) -> dict[str, float]:
        """The held-out loss of each model, all computed in the same way."""
        arguments = {
            "models": {name: str(path) for name, path in models.items()},
            "base": str(self.base),
            "dataset": str(self.dataset),
        }
        say("held-out losses")
        return run_side(
            Path(sys.executable), "finetune.heldout_side", self.folder / "side", arguments, self.variables()
        )["losses"]

    def variables(self) -> dict[str, str]:
        """Environment variables that restrict a side to the CPU or to one GPU, since the trainers would use several."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return {"CUDA_VISIBLE_DEVICES": visible if self.device == "cuda" else ""}

    def context(self) -> dict[str, Any]:
        """What the measurements depend on."""
        return {
            "model": self.model,
            "device": self.device,
            "parameters": self.parameters,
            "context": self.shape.context,
            "global_batch_size": self.shape.global_batch_size,
            "steps": self.steps,
            "warm_up_steps": WARM_UP,
            "documents": self.card["documents"],
            "train_tokens": self.card["tokens"]["train"],
            "packing_efficiency": self.card["packing_efficiency"]["train"],
            "settings": self.settings,
            "versions": self.versions | {"python": platform.python_version()},
            "cores": len(os.sched_getaffinity(0)),
            "seed": SEED,
        }


def speed(steps: list[list[float]]) -> float:
    """Tokens per second of the median step after the warm-up; the median ignores steps that other programs delayed.

    `steps` has, for each step, its number, the tokens trained on by its end, and its end in seconds.
    """
    pairs = itertools.pairwise(step for step in steps if step[0] >= WARM_UP)
    return statistics.median((tokens - before) / (end - start) for (_, before, start), (_, tokens, end) in pairs)


def fastest(sides: dict[str, dict[str, Any]], prefix: str) -> str:
    """The name of the fastest run whose name has a prefix."""
    return max((name for name in sides if name.startswith(prefix)), key=lambda name: sides[name]["tokens_per_s"])


def plausible_mfu(mfu: float) -> float | None:
    """The MFU, or None if it exceeds 1: a CPU's peak is measured, and too low if other programs are busy."""
    if mfu <= 1:
        return mfu
    say(f"mfu: {mfu} is impossible; the peak was measured while other programs were busy")
    return None


if __name__ == "__main__":
    sys.exit(main())
