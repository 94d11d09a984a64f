"""Every command and URL of the document that the cluster is built from leads to what the manifests have."""

import ast
import re
from typing import Any

import pytest
import yaml

from forge.core.settings import PROJECT
from infra.check.network import EXPORTED
from infra.check.placement import nodes_of_tree
from infra.check.tree import Tree, at, key

ROWS = yaml.safe_load((PROJECT / "infra" / "check" / "document.yaml").read_text())["document"]
METRICS = PROJECT / "infra" / "check" / "metrics.yaml"
REMOTE = re.compile(r"([a-z]+)\.([a-z-]+)\.svc\.forge\.remote:(\d+)")


def service(tree: Tree, named: str) -> dict[str, Any] | None:
    """The Service `namespace/name:port`, if there is one with pods behind it."""
    name, _, port = named.partition(":")
    for _, one in tree.services:
        if key(one) == name and port in {str(each["port"]) for each in one["spec"]["ports"]}:
            return one if tree.selected(one["metadata"]["namespace"], one["spec"]["selector"]) else None
    return None


def is_there(tree: Tree, target: str) -> bool:
    """Whether a target is in the manifests, or in the project."""
    kind, _, rest = target.partition("/")
    match kind:
        case "Service":
            return service(tree, rest) is not None
        case "Deployment" | "Job":
            return rest in {key(one) for _, one in tree.of(kind)}
        case "Namespace":
            return rest in {one["metadata"]["name"] for _, one in tree.of("Namespace")}
        case "Node":
            return rest in {node.name for node in nodes_of_tree(tree)}
        case "NodeLabel":
            name, _, value = rest.partition("=")
            return any(node.labels.get(name) == value for node in nodes_of_tree(tree))
        case "Chart":
            charts = {at(one, "spec.chart.spec.chart") for one in tree.releases.values()}
            return rest in charts | {name.partition("/")[2] for name in tree.releases}
        case "Path":
            return (PROJECT / rest).exists()
        case "Workflow":
            module, _, name = rest.rpartition(".")
            source = ast.parse((PROJECT / f"{module.replace('.', '/')}.py").read_text())
            return name in {one.name for one in source.body if isinstance(one, ast.FunctionDef)}
        case "Metric":
            return any(rest in one["metrics"] for one in yaml.safe_load(METRICS.read_text())["exporters"])
    return False


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["text"][:60])
def test_it_leads_somewhere(tree: Tree, row: dict[str, Any]) -> None:
    assert row["verdict"] in ("kept", "fixed", "refused")
    assert ("instead" in row) == (row["verdict"] == "fixed")
    assert row["target"]
    assert [target for target in row["target"] if not is_there(tree, target)] == []


def test_every_url_of_forge_remote_is_an_exported_service(tree: Tree) -> None:
    urls = [found for row in ROWS for found in REMOTE.findall(row["text"])]
    assert len(urls) >= 5
    for name, namespace, port in urls:
        one = service(tree, f"{namespace}/{name}:{port}")
        assert one is not None, name
        assert one["metadata"]["labels"][EXPORTED] == "true"


def test_the_rewrite_leads_each_url_to_its_mirror(tree: Tree) -> None:
    rules = next(one for one in tree.studio if one["metadata"]["name"] == "coredns-custom")["data"]["forge.override"]
    pattern, name = re.search(r"name regex (\S+) (\S+)", rules).groups()  # type: ignore[union-attr]
    for host, mirror in (
        ("vllm.ml-inference.svc.forge.remote", "vllm-forge.ml-inference.svc.cluster.local"),
        ("minio.data-ml.svc.forge.remote", "minio-forge.data-ml.svc.cluster.local"),
    ):
        found = re.fullmatch(pattern.removesuffix("$"), host)
        assert found is not None
        assert name.replace("{1}", found.group(1)).replace("{2}", found.group(2)) == mirror


def test_the_page_of_statements_speaks_of_every_command() -> None:
    page = (PROJECT / "docs" / "source-document.md").read_text()
    assert {row["verdict"] for row in ROWS} <= set(re.findall(r"\| (kept|fixed|refused) \|", page))
    last_cells = re.findall(r"^\| .* \| (?:kept|fixed|refused) \| .*\| ([^|]*)\|$", page, re.M)
    paths = [path for cell in last_cells for path in re.findall(r"`([^`]+)`", cell)]
    assert len(paths) > 50
    assert [path for path in paths if not (PROJECT / path).exists()] == []
