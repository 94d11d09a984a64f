"""The table that a rollout ends with."""

from rich.console import Console

from forge.core.contracts import Deployment
from tasks.rollout.rollout_report import table


def shown(deployment: Deployment) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(deployment))
    return capture.get()


def test_the_table_shows_both_versions_and_how_to_undo_the_rollout() -> None:
    deployment = Deployment(
        endpoint="http://127.0.0.1:8000/v1", name="dates", version="3", digest="abc" * 20, agreement="16 of 16",
        how="adapter", previous="2", previous_digest="def" * 20, swap_seconds=0.31, latency_before=0.21,
        latency_after=0.2,
    )  # fmt: skip
    text = shown(deployment)
    for part in (
        "dates at http://127.0.0.1:8000/v1",
        "abcabcabcabc",
        "defdefdefdef",
        "0.21",
        "0.20",
        "16 of 16",
        "0.31 s",
    ):
        assert part in text
    assert "forge rollback dates --to 2" in text
    first = deployment.model_copy(update={"previous": "", "latency_before": None, "how": "weights"})
    assert "rollback" not in shown(first)
    assert "none" in shown(first)
