"""The closing summary of a run."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from forge.core.contracts import Dataset, Deployment, Evaluation, Result, Version
from forge.core.settings import Settings, path_of
from forge.registry.mlflow_runs import evaluation_experiment
from forge.storage import write_atomically


def seconds_by_stage(stages: Mapping[str, Result], started: float) -> dict[str, float | None]:
    """The seconds of each stage in this run; None if its result came from the cache."""
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
        "report": _readable(evaluation.report),
        "seconds": round(time.time() - started, 1),
        **{f"seconds_{name}": value or 0.0 for name, value in seconds.items()},
        "cached": ", ".join(name for name, value in seconds.items() if value is None),
    }


def _readable(uri: str) -> str:
    """A file on this machine by its path, any other by its URI."""
    return str(path_of(uri)) if uri.startswith("file://") else uri


def version_facts(version: Version) -> dict[str, Any]:
    """The facts of a registered version."""
    return {"name": version.name, "version": version.version, "digest": version.digest, "run_id": version.run_id}


def deployment_facts(deployment: Deployment, version: Version) -> dict[str, Any]:
    """The facts of the version that serves now."""
    return version_facts(version) | {
        "endpoint": deployment.endpoint,
        "answers_as_in_evaluation": deployment.agreement,
        "served_before": deployment.previous,
        "swap": deployment.how,
        "swap_seconds": round(deployment.swap_seconds, 2),
    }


def write_facts(facts: Mapping[str, Any], settings: Settings) -> None:
    """Replace .forge/last-run.json."""
    write_atomically(settings.home / "last-run.json", json.dumps(facts, indent=2) + "\n")


@dataclass(frozen=True)
class Place:
    """Where the run took place: here, where its reader can use make, or on a cluster, with its services."""

    settings: Settings
    cluster: bool

    def ask(self, facts: Mapping[str, Any]) -> tuple[str, str]:
        """How to ask the served model."""
        if not self.cluster:
            return "ask it", 'make ask Q="..."'
        body = json.dumps({"model": facts["name"], "messages": [{"role": "user", "content": "Hello"}]})
        return (
            "ask it",
            f"curl {facts['endpoint']}/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        )

    def registry(self, facts: Mapping[str, Any]) -> tuple[str, str]:
        """Where to see the version in the registry."""
        if not self.settings.mlflow_uri:
            return "registry", "make ui"
        page = f"{self.settings.mlflow_uri.rstrip('/')}/#/models/{facts['name']}/versions/{facts['version']}"
        return "registry", f"{page} (run {facts['run_id']})"

    def execution(self) -> list[tuple[str, str]]:
        """How to see the Flyte execution; empty on this machine."""
        if not self.cluster:
            return []
        project, domain, name = (
            os.environ.get(f"FLYTE_INTERNAL_EXECUTION_{part}", "") for part in ("PROJECT", "DOMAIN", "ID")
        )
        return [("execution", f"flytectl get execution -p {project} -d {domain} {name}")]


def show(
    facts: Mapping[str, Any], stages: Mapping[str, Result], started: float, place: Place, console: Console
) -> None:
    """Print the summary of a run whose model now serves."""
    lines = [
        *_figures(facts),
        ("model", f"{facts['name']} version {facts['version']}, champion, sha256 {facts['digest']}"),
        ("serves at", f"{facts['endpoint']} ({facts['answers_as_in_evaluation']} answers as in evaluation)"),
        ("report", facts["report"]),
        ("time", _times(facts, stages, started)),
        place.ask(facts),
        place.registry(facts),
        *place.execution(),
        *([] if place.cluster else [("stop it", "make stop")]),
    ]
    _print(lines, console)


def show_challenger(
    facts: Mapping[str, Any], stages: Mapping[str, Result], started: float, place: Place, console: Console
) -> None:
    """Print the summary of a run whose model was registered, but not rolled out."""
    lines = [
        *_figures(facts),
        ("model", f"{facts['name']} version {facts['version']}, challenger, sha256 {facts['digest']}"),
        ("rolled out", "no: serving.rollout or FORGE_ROLLOUT is false"),
        ("report", facts["report"]),
        ("time", _times(facts, stages, started)),
        place.registry(facts),
        *place.execution(),
    ]
    _print(lines, console)


def show_rejected(
    facts: Mapping[str, Any], stages: Mapping[str, Result], started: float, place: Place, console: Console
) -> None:
    """Print the summary of a run whose model the gate rejected."""
    champion = (
        f"version {facts['champion_before']} stays the champion" if facts["champion_before"] else "no champion yet"
    )
    experiment = f"experiment {evaluation_experiment(place.settings)} in"
    lines = [
        *_figures(facts),
        ("gate", f"[bold]{escape(facts['reason'])}[/]"),
        ("result", f"nothing was registered or rolled out; {champion}"),
        ("report", facts["report"]),
        ("registry", f"{experiment} {place.settings.mlflow_uri or 'make ui'}"),
        ("time", _times(facts, stages, started)),
        *place.execution(),
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
    lines.append(("NLL", f"{_nats(facts['nll_base'])} → {_nats(facts['nll'])} nats per token"))
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
