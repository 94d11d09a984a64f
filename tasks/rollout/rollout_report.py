"""The closing table of a rollout."""

from rich.table import Table

from forge.core.contracts import Deployment

HOW = {
    "adapter": "an adapter was swapped beside its base: no request was dropped",
    "weights": "vLLM was started with other weights",
    "name": "the public name was moved to what was loaded already",
    "unchanged": "it was serving already",
}


def table(deployment: Deployment) -> Table:
    """What served before and what serves now, how it went, and how to undo it."""
    shown = Table(title=f"{deployment.name} at {deployment.endpoint}", title_justify="left", show_header=True)
    shown.add_column("")
    shown.add_column("before")
    shown.add_column("now")
    before = deployment.previous
    shown.add_row("version", before or "none", deployment.version)
    shown.add_row("sha256", deployment.previous_digest[:12] or "–", deployment.digest[:12])
    shown.add_row("seconds of an answer", _seconds(deployment.latency_before), _seconds(deployment.latency_after))
    shown.add_row("answers as in evaluation", "", deployment.agreement or "not asked")
    shown.add_row("swap", "", f"{deployment.swap_seconds:.2f} s; {HOW[deployment.how]}")
    if before and before != deployment.version:
        command = f"pyflyte run workflows/rollback.py rollback --name {deployment.name} --to {before}"
        shown.add_row("undo it", "", command)
    return shown


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
