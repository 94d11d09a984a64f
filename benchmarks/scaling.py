"""`python -m benchmarks.scaling`: Forge's training on one process and on two. The last line is a JSON object.

The same global batches in fp32, with ddp and fsdp. Each process has one core, so two have twice the cores of one.
docs/benchmarks.md explains the keys.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.finetune.__main__ import WARM_UP, speed
from benchmarks.finetune.data import prepare_dataset
from benchmarks.finetune.forge_side import recipe
from benchmarks.finetune.shapes import SHAPES, VOCABULARY, write_model
from benchmarks.generate import train_tokenizer, write_rows
from benchmarks.measure import PROJECT, SideFailed, say, watch

MODEL = "tiny"
ROWS = 500  # conversations


def main() -> int:
    """Train on one process, then on two with ddp and fsdp, and print how they compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="scaling of Forge's training")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"conversations to train on ({ROWS})")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two processes need two cores")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        with tempfile.TemporaryDirectory(prefix="forge-benchmark-") as name:
            folder = Path(name)
            rows, base = folder / "rows.jsonl", folder / "base"
            write_rows(rows, rows=options.rows)
            train_tokenizer(rows, base, VOCABULARY)
            write_model(SHAPES[MODEL], base)
            dataset = prepare_dataset(rows, base, SHAPES[MODEL].context, folder / "store")
            one, other_cores = train(folder, base, dataset, 1, "ddp")
            result: dict[str, Any] = {}
            for parallelism in ("ddp", "fsdp"):
                prefix = "" if parallelism == "ddp" else "fsdp_"
                two, other_cores_of_two = train(folder, base, dataset, 2, parallelism)
                result |= {f"{prefix}{key}": value for key, value in compare(one, two).items()}
                result |= {f"{prefix}other_cores": max(other_cores, other_cores_of_two)}
            print(json.dumps(result | {"steps": one[-1]["step"], "cores_per_process": 1, "precision": "fp32"}))
    except SideFailed as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def train(
    folder: Path, base: Path, dataset: Path, processes: int, parallelism: str
) -> tuple[list[dict[str, float]], float]:
    """Train with one core per process; returns the loss curve, and how many cores other programs used."""
    say(f"{processes} process{'es' * (processes > 1)}, {parallelism}")
    # The same micro batches on one process and on two.
    settings = {"nproc_per_node": processes, "parallelism": parallelism, "micro_batch_size": 4}
    path, out = folder / "recipe.yaml", folder / "out"
    path.write_text(yaml.safe_dump(recipe(MODEL, str(base), "fp32", False, **settings)))
    cores = ",".join(map(str, itertools.islice(sorted(os.sched_getaffinity(0)), processes)))
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "tasks.finetune"]
    arguments = ["--recipe", str(path), "--data", str(dataset), "--out", str(out)]
    # Processes divide the cores that they may use among their threads.
    command = ["taskset", "--cpu-list", cores, sys.executable, "-m", *launcher, *arguments]
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, stdout=output, stderr=output
        )
        try:
            others = watch(process, f"{processes} on {parallelism}")["other_cores"]
        finally:
            process.terminate()  # torchrun stops its processes
            process.wait()
        if process.returncode:
            output.seek(0)
            last = output.read().splitlines()[-40:]
            raise SideFailed("\n".join([f"training exited with status {process.returncode}:", *last]))
    curve: list[dict[str, float]] = json.loads((out / "training.json").read_text())["curve"]
    shutil.rmtree(out)
    if curve[-1]["step"] < 2 * WARM_UP:
        raise SideFailed(f"{curve[-1]['step']} steps are too few to measure: give more --rows")
    return curve, others


def compare(one: list[dict[str, float]], two: list[dict[str, float]]) -> dict[str, float]:
    """The largest relative difference of the losses, and the speed of two processes relative to twice that of one."""
    differences = [abs(other["loss"] / point["loss"] - 1) for point, other in zip(one, two, strict=True)]
    speeds = [speed([[point["step"], point["tokens"], point["seconds"]] for point in curve]) for curve in (one, two)]
    return {
        "loss_difference": max(differences),
        "tokens_per_s_1": round(speeds[0], 1),
        "tokens_per_s_2": round(speeds[1], 1),
        "efficiency": round(speeds[1] / (2 * speeds[0]), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
