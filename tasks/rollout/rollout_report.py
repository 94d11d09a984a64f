"""The table that a rollout ends with."""

from rich.table import Table

from forge.core.contracts import Deployment

HOW = {
    "adapter": "an adapter was loaded on the running base; no request was dropped",
    "weights": "vLLM was restarted with other weights or options",
    "name": "the public name was moved to a model that was loaded already",
    "unchanged": "it was serving already",
}


def table(deployment: Deployment) -> Table:
    """What served before and what serves now, how the switch went, and how to undo it."""
    shown = Table(title=f"{deployment.name} at {deployment.endpoint}", title_justify="left", show_header=True)
    shown.add_column("")
    shown.add_column("before")
    shown.add_column("now")
    before = deployment.previous
    shown.add_row("version", before or "none", deployment.version)
    shown.add_row("sha256", deployment.previous_digest[:12] or "–", deployment.digest[:12])
    shown.add_row("seconds per answer", _seconds(deployment.latency_before), _seconds(deployment.latency_after))
    shown.add_row("answers as in evaluation", "", deployment.agreement or "not compared")
    shown.add_row("switch", "", f"{deployment.swap_seconds:.2f} s; {HOW[deployment.how]}")
    if before and before != deployment.version:
        command = f"forge rollback {deployment.name} --to {before}"
        shown.add_row("undo it", "", command)
    return shown


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
