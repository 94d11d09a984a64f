"""Check that k3s gives each node the labels and taints of infra/nodes.yaml."""

from collections.abc import Iterator

import yaml

from forge.cluster.nodes import Node
from infra.check.placement import RESERVED_CORES, RESERVED_MEMORY, nodes_of_tree
from infra.check.tree import Tree

CONTROL_PLANE = "node-role.kubernetes.io/control-plane=true:NoSchedule"


def check_nodes(tree: Tree) -> Iterator[str]:
    """Report where the two differ."""
    folder = tree.root / "k3s"
    nodes = nodes_of_tree(tree)
    files = {one.name: "server.yaml" if one.role == "control-plane" else f"{one.name}.yaml" for one in nodes}
    for name in sorted({path.name for path in folder.glob("*.yaml")} - set(files.values())):
        yield f"infra/k3s/{name}: is not a node of infra/nodes.yaml"
    for node in nodes:
        where = f"infra/k3s/{files[node.name]}"
        try:
            config = yaml.safe_load((folder / files[node.name]).read_text())
        except (OSError, yaml.YAMLError) as error:
            yield f"{where}: cannot be read ({' '.join(str(error).split())})"
            continue
        if config.get("node-name") != node.name:
            yield f"{where}: node-name is {config.get('node-name')}, not {node.name}"
        reserved = f"system-reserved=cpu={RESERVED_CORES},memory={RESERVED_MEMORY}Gi"
        if reserved not in (config.get("kubelet-arg") or []):
            yield f"{where}: kubelet-arg lacks {reserved}, which pod placement assumes (infra/check/placement.py)"
        for field, expected in (("node-label", labels_of(node)), ("node-taint", taints_of(node))):
            present = set(config.get(field) or [])
            for one in sorted(expected - present):
                yield f"{where}: {field} lacks {one}"
            for one in sorted(present - expected):
                yield f"{where}: {field} has {one}, which infra/nodes.yaml does not list"


def labels_of(node: Node) -> set[str]:
    """A node's labels in k3s's format."""
    found = {"role": node.role, **({"pool": node.pool} if node.pool else {}), **node.labels}
    return {f"{name}={value}" for name, value in found.items()}


def taints_of(node: Node) -> set[str]:
    """A node's taints in k3s's format."""
    found = {f"{one.key}={one.value}:{one.effect}" for one in node.taints}
    return found | ({CONTROL_PLANE} if node.role == "control-plane" else set())
