"""EleutherAI's lm-evaluation-harness, in an environment of its own: the tasks that a recipe names, or has as YAML."""

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from forge.core.errors import ForgeError, Problems
from forge.core.settings import Settings

SEED = 0
LINES = 3  # of its log that a message ends with


def check_harness(tasks: Sequence[str], settings: Settings) -> None:
    """Raise Problems where the environment is not there, or a task's file is none; its name is known when it runs."""
    problems = []
    probe = [str(settings.harness_python), "-c", "from importlib.metadata import version; version('lm_eval')"]
    try:
        subprocess.run(probe, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        problems.append(
            f"evaluation.harness_tasks: lm-evaluation-harness is not installed for {settings.harness_python}: run make "
            ".venv-harness, or set FORGE_HARNESS_PYTHON"
        )
    for task in filter(is_file, tasks):
        try:
            document = yaml.load(Path(task).read_text(encoding="utf-8"), _AnyTag)  # noqa: S506 (tags make nothing)
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"evaluation.harness_tasks {task}: cannot be read ({error}); give the path of a YAML file")
        except yaml.YAMLError as error:
            problems.append(f"evaluation.harness_tasks {task}: not valid YAML: {getattr(error, 'problem', error)}")
        else:
            if not isinstance(document, dict) or "task" not in document:
                problems.append(f"evaluation.harness_tasks {task}: has no key task, which names it; add it")
    if problems:
        raise Problems("The harness' tasks cannot run:", problems)


def is_file(task: str) -> bool:
    """Whether a task is the path of a YAML file, and not a name."""
    return task.endswith((".yaml", ".yml"))


class _AnyTag(yaml.SafeLoader):
    """Takes the harness' own tags, such as !function, for nothing."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def run_harness(model: Path, tasks: Sequence[str], settings: Settings, batch_size: int) -> dict[str, float]:
    """A model's scores on tasks, as harness/<task>/<metric>. Its log is shown where it fails.

    Raises ForgeError where a task is unknown or broken, or its data cannot be had.
    """
    import torch  # preflight has no need of it

    with tempfile.TemporaryDirectory(prefix="forge-harness-") as folder:
        command = [
            settings.harness_python, "-m", "lm_eval", "run",
            "--model", "hf",
            "--model_args", f"pretrained={model},dtype=auto,trust_remote_code=False",
            "--tasks", *(str(Path(task).absolute()) if is_file(task) else task for task in tasks),
            "--apply_chat_template",  # what is trained here is conversations
            "--batch_size", str(batch_size),
            "--device", "cuda" if torch.cuda.is_available() else "cpu",
            "--seed", str(SEED),
            "--output_path", folder,
        ]  # fmt: skip
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = sorted(Path(folder).rglob("results_*.json"))
        if status or not found:
            raise ForgeError(
                f"evaluation.harness_tasks {', '.join(tasks)}: lm-evaluation-harness failed: {_reason(log)}; mend the "
                "task, or take it out"
            )
        return read_results(json.loads(found[-1].read_text()))


def read_results(document: dict) -> dict[str, float]:
    """The scores in the harness' own results: a metric with its filter, where that is not none, and no errors of it."""
    scores: dict[str, float] = {}
    for task, metrics in document["results"].items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and kind:
                score = f"harness/{task}/{metric}" + ("" if kind == "none" else f".{kind}")
                scores[re.sub(r"[^\w./ -]", "_", score)] = float(value)  # what MLflow takes: pass@1 is pass_1
    return scores


def _reason(log: Path) -> str:
    """The last lines of a log that say something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [re.sub(r"^[\d:., -]+(ERROR|WARNING|INFO) +\[.*?\] ", "", line) for line in lines[-LINES:]]
    return " ".join(told) or "it said nothing"
