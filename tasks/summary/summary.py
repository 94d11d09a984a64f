"""The closing summary of a run."""

import json
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from tasks.contracts import Dataset, Deployment, Evaluation, Result
from tasks.settings import Settings
from tasks.storage import write_atomically


def seconds_by_stage(stages: Mapping[str, Result], started: float) -> dict[str, float | None]:
    """Seconds that each stage took in this run; None where an earlier run's result was taken from the cache."""
    return {name: round(stage.seconds, 1) if stage.started >= started else None for name, stage in stages.items()}


def facts_of(dataset: Dataset, evaluation: Evaluation, stages: Mapping[str, Result], started: float) -> dict[str, Any]:
    """The facts of a run up to its evaluation, as one flat mapping."""
    seconds = seconds_by_stage(stages, started)
    return {
        "verdict": evaluation.verdict,
        "reason": evaluation.reason,
        "champion_before": evaluation.champion,
        "train_rows": dataset.train_rows,
        "heldout_rows": dataset.heldout_rows,
        "items": evaluation.items,
        "score": evaluation.score,
        "score_base": evaluation.score_base,
        "score_champion": evaluation.score_champion,
        "exact_match": evaluation.exact_match,
        "json_validity": evaluation.json_validity,
        "nll": evaluation.nll,
        "nll_base": evaluation.nll_base,
        "report": evaluation.report,
        "seconds": round(time.time() - started, 1),
        **{f"seconds_{name}": value or 0.0 for name, value in seconds.items()},
        "cached": ", ".join(name for name, value in seconds.items() if value is None),
    }


def released(deployment: Deployment) -> dict[str, Any]:
    """The facts of what serves now."""
    return {
        "name": deployment.name,
        "version": deployment.version,
        "digest": deployment.digest,
        "endpoint": deployment.endpoint,
        "answers_as_in_evaluation": deployment.agreement,
        "served_before": deployment.previous,
        "swap": deployment.how,
        "swap_seconds": round(deployment.swap_seconds, 2),
    }


def write_facts(facts: Mapping[str, Any], settings: Settings) -> None:
    """Replace .forge/last-run.json."""
    write_atomically(settings.home / "last-run.json", json.dumps(facts, indent=2) + "\n")


def show(facts: Mapping[str, Any], stages: Mapping[str, Result], started: float, console: Console) -> None:
    """Print the summary of a run whose model serves."""
    lines = [
        *_figures(facts),
        ("model", f"{facts['name']} version {facts['version']}, champion, sha256 {facts['digest']}"),
        ("serves at", f"{facts['endpoint']} ({facts['answers_as_in_evaluation']} answers as in evaluation)"),
        ("report", facts["report"]),
        ("time", _times(facts, stages, started)),
        ("ask it", 'make ask Q="..."'),
        ("registry", "make ui"),
        ("stop it", "make stop"),
    ]
    _print(lines, console)


def show_held_back(facts: Mapping[str, Any], stages: Mapping[str, Result], started: float, console: Console) -> None:
    """Print the summary of a run whose model the gate held back."""
    champion = (
        f"version {facts['champion_before']} stays the champion" if facts["champion_before"] else "no champion yet"
    )
    lines = [
        *_figures(facts),
        ("gate", f"[bold]{escape(facts['reason'])}[/]"),
        ("so", f"nothing was registered or rolled out; {champion}"),
        ("see more", f"{facts['report']}, or the experiment forge-evaluation in make ui"),
        ("time", _times(facts, stages, started)),
    ]
    _print(lines, console)


def _figures(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("data", f"{facts['train_rows']:,} conversations to train on, {facts['heldout_rows']:,} held out"),
        (
            "score",
            f"{_percent(facts['score_base'])} → [bold]{_percent(facts['score'])}[/] on {facts['items']} held-out "
            "prompts",
        ),
    ]
    if facts["score_champion"] is not None:
        lines.append(("champion", f"version {facts['champion_before']} scored {_percent(facts['score_champion'])}"))
    lines.append(("NLL", f"{_nats(facts['nll_base'])} → {_nats(facts['nll'])} nats a token"))
    if facts["json_validity"] is not None:
        lines.append(("valid JSON", _percent(facts["json_validity"])))
    return lines


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _times(facts: Mapping[str, Any], stages: Mapping[str, Result], started: float) -> str:
    seconds = seconds_by_stage(stages, started)
    times = "  ".join(f"{name} {'cached' if value is None else f'{value:.0f} s'}" for name, value in seconds.items())
    return f"{facts['seconds']:.0f} s: {times}"


def _print(lines: list[tuple[str, str]], console: Console) -> None:
    console.print()
    for label, text in lines:
        console.print(f"[dim]{label:<12}[/] {text}", soft_wrap=True, highlight=False)
