"""Rules and dashboards use metrics that the exporters really have."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from forge.core.settings import PROJECT, Settings
from forge.serving.desired import Actual
from forge.serving.reconciler_status import Status
from forge.serving.vllm_client import Names
from tasks.finetune.telemetry import GPU_GAUGES, TRAINING_GAUGES, Telemetry

MONITORING = PROJECT / "infra" / "apps" / "monitoring"
EXPORTERS = {
    one["exporter"]: set(one["metrics"])
    for one in yaml.safe_load((PROJECT / "infra" / "check" / "metrics.yaml").read_text())["exporters"]
}
FUNCTIONS = {
    "absent", "abs", "and", "avg", "avg_over_time", "by", "changes", "count", "histogram_quantile", "increase", "Inf",
    "max", "min", "or", "rate", "sum", "time",
}  # fmt: skip
PARTS = ("_bucket", "_sum", "_count")  # of a histogram


def queries() -> Iterator[tuple[str, str]]:
    """Each query of a rule or a dashboard, with its location."""
    for path in sorted((MONITORING / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text()).get("spec", {}).get("groups", []):
            for rule in group["rules"]:
                yield f"{path.name} {rule['alert']}", rule["expr"]
    for path in sorted((MONITORING / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{path.name} {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield (
                    f"{path.name} {variable['name']}",
                    variable["definition"].removeprefix("label_values(").split(",")[0],
                )


def names_in(query: str) -> set[str]:
    """The metrics in a query: the words that are not labels, functions or numbers."""
    bare = re.sub(r'"[^"]*"', "", query)
    for pattern in (r"\{[^}]*\}", r"\[[^\]]*\]", r"\b(by|without|on|ignoring) \([^)]*\)"):
        bare = re.sub(pattern, " ", bare)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - FUNCTIONS


def test_names_in_finds_only_metrics() -> None:
    query = 'histogram_quantile(0.95, sum by (le, service) (rate(vllm:ttft_bucket{service=~"up|x"}[5m]))) > up'
    assert names_in(query) == {"vllm:ttft_bucket", "up"}


def test_every_query_uses_existing_metrics() -> None:
    known = set().union(*EXPORTERS.values())
    used = set()
    for where, query in queries():
        for name in names_in(query):
            base = next((name.removesuffix(part) for part in PARTS if name.removesuffix(part) in known), name)
            assert base in known, f"{where}: {name}"
            used.add(base)
    assert known - used == set(), "in metrics.yaml, but not used"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus")
def test_prometheus_accepts_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{n}", "expr": query.replace("$__rate_interval", "5m")}
        for n, (_, query) in enumerate(queries())
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_panels_do_not_overlap_and_have_units() -> None:
    for path in (MONITORING / "dashboards").glob("*.json"):
        dashboard = json.loads(path.read_text())
        places = [panel["gridPos"] for panel in dashboard["panels"]]
        assert all(place["x"] + place["w"] <= 24 for place in places)
        cells = [
            (x, y)
            for place in places
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells)), f"panels of {path.name} overlap"
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
        assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in dashboard["panels"])


def exposed(collector: Collector) -> set[str]:
    """The names of a collector's metrics in Prometheus."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in registry.collect()}


def test_training_exposes_the_listed_metrics() -> None:
    telemetry = Telemetry(
        Settings(),
        "dates",
        {},
        training="dates",
        steps=3,
        device=torch.device("cpu"),
        flops_per_token=1.0,
        peak_flops=1.0,
    )
    telemetry._latest = dict.fromkeys([*TRAINING_GAUGES, *GPU_GAUGES, "step", "skipped_steps"], 1.0)
    assert exposed(telemetry) == EXPORTERS["forge-training"]


def test_reconciler_exposes_the_listed_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reconciler:
        actual, counts, loads, load_seconds = Actual(), Names(), 1, 1.0

    status: Any = object.__new__(Status)  # without its server
    status.reconciler = Reconciler()
    assert EXPORTERS["forge-reconciler"] <= exposed(status)


def test_vllm_has_the_listed_metrics() -> None:
    found = list((PROJECT / ".venv-serving").glob("lib/python*/site-packages/vllm/v1/metrics/loggers.py"))
    if not found:
        pytest.skip("the serving environment is missing: make setup")
    names = set(re.findall(r'"(vllm:\w+)"', found[0].read_text()))
    assert {name.removesuffix("_total") for name in EXPORTERS["vllm"]} <= names
