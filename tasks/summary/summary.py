"""The closing summary of a run."""

import json
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from tasks.contracts import Dataset, Deployment, Evaluation, Result
from tasks.settings import Settings
from tasks.storage import write_atomically


def seconds_by_stage(stages: Mapping[str, Result], started: float) -> dict[str, float | None]:
    """Seconds that each stage took in this run; None where an earlier run's result was taken from the cache."""
    return {name: round(stage.seconds, 1) if stage.started >= started else None for name, stage in stages.items()}


def facts_of(
    dataset: Dataset, evaluation: Evaluation, deployment: Deployment, stages: Mapping[str, Result], started: float
) -> dict[str, Any]:
    """The run's facts as one flat mapping."""
    seconds = seconds_by_stage(stages, started)
    return {
        "name": deployment.name,
        "version": deployment.version,
        "digest": deployment.digest,
        "endpoint": deployment.endpoint,
        "train_rows": dataset.train_rows,
        "heldout_rows": dataset.heldout_rows,
        "items": evaluation.items,
        "exact_match": evaluation.exact_match,
        "exact_match_before": evaluation.exact_match_before,
        "json_validity": evaluation.json_validity,
        "nll": evaluation.nll,
        "nll_before": evaluation.nll_before,
        "answers_as_in_evaluation": deployment.agreement,
        "report": evaluation.report,
        "seconds": round(time.time() - started, 1),
        **{f"seconds_{name}": value or 0.0 for name, value in seconds.items()},
        "cached": ", ".join(name for name, value in seconds.items() if value is None),
    }


def write_facts(facts: Mapping[str, Any], settings: Settings) -> None:
    """Replace .forge/last-run.json."""
    write_atomically(settings.home / "last-run.json", json.dumps(facts, indent=2) + "\n")


def show(facts: Mapping[str, Any], stages: Mapping[str, Result], started: float, console: Console) -> None:
    """Print the summary."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    seconds = seconds_by_stage(stages, started)
    times = "  ".join(f"{name} {'cached' if value is None else f'{value:.0f} s'}" for name, value in seconds.items())
    valid = [("valid JSON", percent(facts["json_validity"]))] if facts["json_validity"] is not None else []
    before, after = percent(facts["exact_match_before"]), percent(facts["exact_match"])
    lines = [
        ("data", f"{facts['train_rows']:,} conversations to train on, {facts['heldout_rows']:,} held out"),
        ("exact match", f"{before} → [bold]{after}[/] on {facts['items']} held-out prompts"),
        ("NLL", f"{facts['nll_before']:.4f} → {facts['nll']:.4f} nats a token"),
        *valid,
        ("model", f"{facts['name']} version {facts['version']}, champion, sha256 {facts['digest']}"),
        ("serves at", f"{facts['endpoint']} ({facts['answers_as_in_evaluation']} answers as in evaluation)"),
        ("report", facts["report"]),
        ("time", f"{facts['seconds']:.0f} s: {times}"),
        ("ask it", 'make ask Q="..."'),
        ("registry", "make ui"),
        ("stop it", "make stop"),
    ]
    console.print()
    for label, text in lines:
        console.print(f"[dim]{label:<12}[/] {text}", soft_wrap=True, highlight=False)
