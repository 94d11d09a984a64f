"""A job killed at any moment, on any number of processes, resumes and ends with the same result."""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.finetune.job import curve, run, start, write_data, write_recipe

KILLS = int(os.environ.get("FORGE_TEST_KILLS", "4"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("rows") / "data", rows=64)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def cut(process: subprocess.Popen, after: str, seconds: float) -> str:
    """Kill everything some time after a line is printed; returns the output until then."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if after in line:
            threading.Timer(seconds, lambda: kill(process)).start()
            break
    rest, _ = process.communicate(timeout=120)
    return output + rest


def kill(process: subprocess.Popen) -> None:
    """SIGKILL the launcher; its ranks die with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def latest(checkpoints: Path) -> int:
    """The latest step with a complete checkpoint."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def test_two_processes_save_on_sigterm(data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", nproc_per_node=2, epochs=200, checkpoint_steps=1000)
    process = start(recipe, data, tmp_path / "out", 2)
    assert process.stdout is not None
    while "train: " not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "saved its state" in output
    (saved,) = (tmp_path / "out.checkpoints").iterdir()
    assert int(saved.name) > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_kills_at_random_moments_do_not_change_a_bit(data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", nproc_per_node=2, epochs=100, checkpoint_steps=2)
    run(recipe, data, tmp_path / "whole", 2)
    rng = random.Random(5)
    steps = []
    for _ in range(KILLS):
        output = cut(start(recipe, data, tmp_path / "cut", 2), "train: ", rng.uniform(0, 1.5))
        if (tmp_path / "cut").exists():
            break
        steps.append(latest(tmp_path / "cut.checkpoints"))
        assert steps == sorted(steps), output
    assert len(steps) == KILLS, f"it finished before the last kill: {steps}"
    run(recipe, data, tmp_path / "cut", 2)
    assert len(set(steps)) > KILLS // 3, f"kills must hit different steps: {steps}"
    whole, cut_weights = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut_weights[name]) for name in whole)
    assert [point["loss"] for point in curve(tmp_path / "whole")] == [
        point["loss"] for point in curve(tmp_path / "cut")
    ]
    assert not (tmp_path / "cut.checkpoints").exists()


@pytest.mark.long
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_run_resumes_with_fewer_and_with_more_processes(parallelism: str, data: Path, tmp_path: Path) -> None:
    training = {"epochs": 20, "checkpoint_steps": 2, "parallelism": parallelism, "learning_rate": 1e-3}
    recipes = {n: write_recipe(tmp_path / f"{n}.yaml", nproc_per_node=n, **training) for n in (1, 2)}
    run(recipes[2], data, tmp_path / "whole", 2)
    seen = [0]
    for processes in (2, 1):
        process = start(recipes[processes], data, tmp_path / "cut", processes)
        while (saved := latest(tmp_path / "cut.checkpoints")) <= seen[-1]:
            assert process.poll() is None
            time.sleep(0.05)
        kill(process)
        process.communicate(timeout=60)
        seen.append(saved)
    assert not (tmp_path / "cut").exists()
    run(recipes[2], data, tmp_path / "cut", 2)
    whole, other = curve(tmp_path / "whole"), curve(tmp_path / "cut")
    assert len(whole) == len(other)
    assert max(abs(one["loss"] - two["loss"]) for one, two in zip(whole, other, strict=True)) < 1e-5
