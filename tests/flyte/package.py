"""Reads the package that `pyflyte package` writes, as Flyte's admin does."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flyteidl.admin.launch_plan_pb2 import LaunchPlan
from flyteidl.admin.task_pb2 import TaskSpec
from flyteidl.admin.workflow_pb2 import WorkflowSpec
from google.protobuf.json_format import MessageToDict

KINDS = {"1": TaskSpec, "2": WorkflowSpec, "3": LaunchPlan}


class Package:
    """Tasks, workflows and launch plans by name, as JSON."""

    def __init__(self, path: Path) -> None:
        self.found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self.names: list[tuple[str, str]] = []
        self.bytes = b""
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                data = archive.extractfile(member)
                kind = member.name.removesuffix(".pb")[-1]
                if data is None or kind not in KINDS:
                    continue
                raw = data.read()
                self.bytes += raw
                entity = MessageToDict(KINDS[kind].FromString(raw))
                name = (entity if kind == "3" else entity["template"])["id"]["name"]
                self.names.append((kind, name))
                self.found[kind][name] = entity
        self.tasks = {name: entity["template"] for name, entity in self.found["1"].items()}
        self.workflows = {name: entity["template"] for name, entity in self.found["2"].items()}
        self.plans = {name: entity["spec"] for name, entity in self.found["3"].items()}

    def inputs(self, reference: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a task or workflow."""
        interfaces = {**self.tasks, **self.workflows}
        return dict(interfaces[reference["name"]]["interface"].get("inputs", {}).get("variables", {}))

    def nodes(self, within: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """The nodes that run something, including those in branches, with their workflow's name."""
        for name, workflow in self.workflows.items():
            if within not in ("", name):
                continue
            waiting = [*workflow["nodes"], *([workflow["failureNode"]] if "failureNode" in workflow else [])]
            while waiting:
                node = waiting.pop()
                if branch := node.get("branchNode", {}).get("ifElse"):
                    cases = [branch["case"], *branch.get("other", [])]
                    waiting += [case["thenNode"] for case in cases]
                    waiting += [branch["elseNode"]] if "elseNode" in branch else []
                elif node["id"] not in ("start-node", "end-node"):
                    yield name, node


def short(name: str) -> str:
    """The last part of a task's name."""
    return name.rpartition(".")[2]


def pod_of(task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A task's pod, and its only container."""
    spec = task["k8sPod"]["podSpec"]
    (container,) = spec["containers"]
    return spec, container


def quantity(text: str) -> int:
    """A Kubernetes quantity: cores, GPUs, or GiB."""
    return int(text.removesuffix("Gi"))
