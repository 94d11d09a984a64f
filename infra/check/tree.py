"""The manifests, built as Flux builds them, and the pods and Services that they create, including those of charts."""

import functools
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob")
BUILTIN = {"default", "kube-system", "kube-public", "flux-system"}  # namespaces that exist before Flux applies anything
LISTS = ("nodes", "charts", "external", "versions", "exceptions", "connections")


@dataclass(frozen=True)
class Pod:
    """Pods of one workload: at most `replicas`, and `surge` more during an update."""

    where: str
    namespace: str
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: Object
    kind: str
    replicas: int = 1
    surge: int = 0
    chart: bool = False  # created by a chart: only what its values set is known of the spec

    @property
    def containers(self) -> list[Object]:
        """The containers that run together."""
        return list(self.spec.get("containers", []))

    @property
    def ports(self) -> dict[str, int]:
        """The containers' ports by name, or by number if unnamed."""
        found = [port for one in self.containers for port in one.get("ports", [])]
        return {str(port.get("name", port["containerPort"])): port["containerPort"] for port in found}

    def port(self, name: int | str) -> int | None:
        """The number of the port with this name or number; None if the pod has none."""
        if isinstance(name, int):
            return name if name in self.ports.values() else None
        return self.ports.get(name)


@dataclass(frozen=True)
class Tree:
    """All of infra/: the objects of each app (`namespace/app`), of Flux and of studio, and the lists next to them.

    `problems` lists what could not be read.
    """

    root: Path
    apps: dict[str, list[Object]] = field(default_factory=dict)
    flux: list[Object] = field(default_factory=list)
    studio: list[Object] = field(default_factory=list)
    lists: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @functools.cached_property
    def objects(self) -> list[tuple[str, Object]]:
        """Each object of the forge cluster, with its folder."""
        apps = [(f"infra/apps/{app}", one) for app, objects in self.apps.items() for one in objects]
        return [*apps, *(("infra/flux", one) for one in self.flux)]

    def of(self, *kinds: str) -> Iterator[tuple[str, Object]]:
        """The objects of these kinds, each with its folder, kind and name as text."""
        return ((name_of(where, one), one) for where, one in self.objects if one.get("kind") in kinds)

    @functools.cached_property
    def releases(self) -> dict[str, Object]:
        """The HelmReleases, by namespace/name."""
        return {key(one): one for _, one in self.of("HelmRelease")}

    @functools.cached_property
    def pods(self) -> list[Pod]:
        """All pods: those of plain manifests, and those of charts by infra/charts.yaml."""
        plain = [pod for where, one in self.of(*WORKLOADS, "PyTorchJob") for pod in _pods(where, one)]
        return [*plain, *(pod for pod in self._of_charts())]

    def _of_charts(self) -> Iterator[Pod]:
        for chart in self.lists["charts"]:
            release = self.releases.get(chart["release"])
            if release is None:
                continue
            values = release["spec"].get("values") or {}
            for one in chart.get("pods", []):
                ports = [{"name": name, "containerPort": port} for name, port in one.get("ports", {}).items()]
                found = [resources_of(at(values, path)) for path in one.get("resources", [])] or [one.get("fixed", {})]
                containers: list[Object] = [{"name": f"{n}", "resources": each} for n, each in enumerate(found)]
                containers[0]["ports"] = ports
                every = [{"operator": "Exists"}] if one["kind"] == "DaemonSet" else []
                spec = {
                    "containers": containers,
                    "nodeSelector": {**one.get("selects", {}), **(at(values, one.get("nodeSelector", "")) or {})},
                    "tolerations": every or at(values, one.get("tolerations", "")) or [],
                    "priorityClassName": at(values, one.get("priority", "")) or "",
                }
                replicas, home = one.get("replicas", 1), one.get("namespace", chart["release"].split("/")[0])
                labels, notes = one["labels"], one.get("annotations", {})
                where = f"infra/charts.yaml: {chart['release']} {one['name']}"
                yield Pod(
                    where, home, labels, notes, spec, one["kind"], replicas, int(one["kind"] == "Deployment"), True
                )

    @functools.cached_property
    def services(self) -> list[tuple[str, Object]]:
        """All Services, including those of charts."""
        made = [
            (
                f"infra/charts.yaml: {chart['release']}: Service {one['name']}",
                {
                    "kind": "Service",
                    "metadata": {
                        "name": one["name"], "namespace": chart["release"].split("/")[0],
                        "labels": one.get("labels", {}),
                    },
                    "spec": {
                        "selector": one["selector"],
                        "ports": [
                            {"name": name, "port": port["port"], "targetPort": port["target"]}
                            for name, port in one["ports"].items()
                        ],
                    },
                },
            )
            for chart in self.lists["charts"] if chart["release"] in self.releases
            for one in chart.get("services", [])
        ]  # fmt: skip
        return [*self.of("Service"), *made]

    def selected(self, namespace: str, selector: Object | None) -> list[Pod]:
        """The pods in a namespace that a selector matches; an empty selector matches all."""
        return [pod for pod in self.pods if pod.namespace == namespace and matches(selector or {}, pod.labels)]


def read_lists(root: Path, problems: list[str]) -> dict[str, Any]:
    """The lists next to the manifests; one that cannot be read is empty, and is added to the problems."""
    found: dict[str, Any] = {}
    for name in LISTS:
        try:
            found[name] = load((root / f"{name}.yaml").read_text())[0][name]
        except (OSError, yaml.YAMLError, IndexError, KeyError, TypeError) as error:
            found[name] = []
            problems.append(f"infra/{name}.yaml: has no list `{name}` ({_line(error)})")
    return found


def read_tree(root: Path) -> Tree:
    """Build everything in a directory with the layout of infra/."""
    tree = Tree(root)
    tree.lists.update(read_lists(root, tree.problems))
    for folder in sorted(path.parent for path in root.glob("apps/*/*/kustomization.yaml")):
        tree.apps[f"{folder.parent.name}/{folder.name}"] = _read(folder, root, tree.problems)
    tree.flux.extend(_read(root / "flux", root, tree.problems))
    tree.studio.extend(_read(root / "studio", root, tree.problems))
    return tree


def _read(folder: Path, root: Path, problems: list[str]) -> list[Object]:
    where = f"infra/{folder.relative_to(root).as_posix()}"
    try:
        files = {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}
        named = str(load(files["kustomization.yaml"]))
        problems.extend(
            f"{where}: {file} is not in kustomization.yaml; list or remove it"
            for file in files
            if file.endswith((".yaml", ".json")) and file != "kustomization.yaml" and file not in named
        )
        objects = load(_build(folder, files))
    except (OSError, KeyError, ValueError, yaml.YAMLError, RuntimeError) as error:
        problems.append(f"{where}: does not build ({_line(error)})")
        return []
    return [one for one in objects if one]


_built: dict[tuple[tuple[str, str], ...], str] = {}  # by a folder's files: unchanged folders are built once


def _build(folder: Path, files: dict[str, str]) -> str:
    """Build a folder with kubectl; raises RuntimeError if it fails."""
    contents = tuple(files.items())
    if contents not in _built:
        done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().replace(str(folder), "."))
        _built[contents] = done.stdout
    return _built[contents]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _pods(where: str, one: Object) -> Iterator[Pod]:
    """The pods of a workload."""
    kind, spec = one["kind"], one.get("spec") or {}
    if kind == "PyTorchJob":
        for role, part in (spec.get("pytorchReplicaSpecs") or {}).items():
            yield _pod(f"{where} {role}", one, part.get("template") or {}, kind, part.get("replicas", 1), 0)
        return
    if kind == "CronJob":
        spec = (spec.get("jobTemplate") or {}).get("spec") or {}
    replicas, surge = 1, 0
    if kind in ("Deployment", "StatefulSet"):
        replicas = spec.get("replicas", 1)
    if kind == "Deployment" and (spec.get("strategy") or {}).get("type") != "Recreate":
        surge = math.ceil(replicas / 4)  # maxSurge is 25 % by default
    yield _pod(where, one, spec.get("template") or {}, kind, replicas, surge)


def _pod(where: str, one: Object, template: Object, kind: str, replicas: int, surge: int) -> Pod:
    metadata = template.get("metadata") or {}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    namespace = one["metadata"].get("namespace", "")
    return Pod(where, namespace, labels, annotations, template.get("spec") or {}, kind, replicas, surge)


def resources_of(found: Object | None) -> Object:
    """A container's resources; also converts the form of Linkerd's charts: cpu.request, memory.limit."""
    if not found or not isinstance(found.get("cpu", found.get("memory")), dict):
        return found or {}
    return {
        f"{kind}s": {name: str(one[kind]) for name, one in found.items() if one.get(kind)}
        for kind in ("request", "limit")
    }


def load(text: str) -> list[Any]:
    """The documents of a YAML text, read with libyaml."""
    return list(yaml.load_all(text, yaml.CSafeLoader))


def name_of(where: str, one: Object) -> str:
    """An object as text: its folder, kind and name."""
    return f"{where}: {one.get('kind')} {(one.get('metadata') or {}).get('name')}"


def key(one: Object) -> str:
    """namespace/name."""
    return f"{one['metadata'].get('namespace', '')}/{one['metadata']['name']}"


def at(values: Any, path: str) -> Any:
    """The value at a dotted path in nested mappings; digits are a list index. None if it does not exist."""
    for part in path.split(".") if path else []:
        if isinstance(values, list) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, dict):
            values = values.get(part)
        else:
            return None
    return values if path else None


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels and matchExpressions, or plain labels) matches these labels."""
    if not selector.keys() <= {"matchLabels", "matchExpressions"}:
        return selector.items() <= labels.items()
    exact = selector.get("matchLabels") or {}
    return exact.items() <= labels.items() and all(
        {
            "In": labels.get(one["key"]) in (one.get("values") or []),
            "NotIn": labels.get(one["key"]) not in (one.get("values") or []),
            "Exists": one["key"] in labels,
            "DoesNotExist": one["key"] not in labels,
        }[one["operator"]]
        for one in selector.get("matchExpressions") or []
    )
