"""Scores from EleutherAI's lm-evaluation-harness, which runs in its own Python environment.

A recipe gives the tasks by name, or as YAML files.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from forge.core.errors import ForgeError, Problems
from forge.core.full_disk import temporary_directory
from forge.core.settings import Settings

SEED = 0
LINES = 3  # of its log in an error message


def check_harness(tasks: Sequence[str], settings: Settings) -> None:
    """Raise Problems if the environment is missing or a task file is invalid. Names are only checked by the harness."""
    problems = []
    probe = [str(settings.harness_python), "-c", "from importlib.metadata import version; version('lm_eval')"]
    try:
        subprocess.run(probe, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        problems.append(
            f"evaluation.harness_tasks: lm-evaluation-harness is not installed for {settings.harness_python}; run make "
            ".venv-harness, or set FORGE_HARNESS_PYTHON"
        )
    for task in filter(is_file, tasks):
        try:
            document = yaml.load(Path(task).read_text(encoding="utf-8"), _AnyTag)  # noqa: S506 (tags are ignored)
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"evaluation.harness_tasks {task}: cannot be read ({error}); give the path of a YAML file")
        except yaml.YAMLError as error:
            problems.append(f"evaluation.harness_tasks {task}: not valid YAML: {getattr(error, 'problem', error)}")
        else:
            if not isinstance(document, dict) or "task" not in document:
                problems.append(f"evaluation.harness_tasks {task}: has no key `task`; add it with the task's name")
    if problems:
        raise Problems("The harness tasks cannot run:", problems)


def is_file(task: str) -> bool:
    """Whether a task is given as the path of a YAML file, not by name."""
    return task.endswith((".yaml", ".yml"))


class _AnyTag(yaml.SafeLoader):
    """Reads the harness' own tags, such as !function, as null."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def run_harness(model: Path, tasks: Sequence[str], settings: Settings, batch_size: int) -> dict[str, float]:
    """A model's scores on tasks, named harness/<task>/<metric>.

    Raises ForgeError with the end of the harness' log if a task is unknown or broken, or its data is unavailable.
    """
    from tasks.evaluate.answer import local_devices  # imports torch, which preflight does not need

    with temporary_directory("forge-harness-", "the files of lm-evaluation-harness") as folder:
        command = [
            settings.harness_python, "-m", "lm_eval", "run",
            "--model", "hf",
            "--model_args", f"pretrained={model},dtype=auto,trust_remote_code=False",
            "--tasks", *(str(Path(task).absolute()) if is_file(task) else task for task in tasks),
            "--apply_chat_template",  # models are trained on conversations
            "--batch_size", str(batch_size),
            "--device", "cpu" if local_devices() == ["cpu"] else "cuda",
            "--seed", str(SEED),
            "--output_path", str(folder),
        ]  # fmt: skip
        log = folder / "log"
        status = _run(command, log)
        results = sorted(folder.rglob("results_*.json"))
        if status or not results:
            raise ForgeError(
                f"lm-evaluation-harness failed: {_reason(log)}",
                where=f"evaluation.harness_tasks {', '.join(tasks)}",
                fix="fix the task, or remove it",
            )
        return read_results(json.loads(results[-1].read_text(encoding="utf-8")))


def _run(command: Sequence[str | Path], log: Path) -> int:
    """The exit status of a command whose output goes to `log`; all its processes have ended."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_results(document: dict) -> dict[str, float]:
    """The scores in the harness' results file, named by task, metric and filter, without standard errors."""
    scores: dict[str, float] = {}
    for task, metrics in document["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and filtered:
                score = f"harness/{task}/{metric}" + ("" if filtered == "none" else f".{filtered}")
                scores[re.sub(r"[^\w./ -]", "_", score)] = float(value)  # MLflow's characters: pass@1 is pass_1
    return scores


def _reason(log: Path) -> str:
    """The last lines of a log that are not blank."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    messages = [re.sub(r"^[\d:., -]+(ERROR|WARNING|INFO) +\[.*?\] ", "", line) for line in lines[-LINES:]]
    return " ".join(messages) or "its log is empty"
