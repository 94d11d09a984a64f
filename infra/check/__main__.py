"""`python -m infra.check`: report each problem in the manifests on a line; exits with 1 if there are any."""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from infra.check.hygiene import check_hygiene
from infra.check.network import check_network
from infra.check.nodes import check_nodes
from infra.check.placement import check_placement
from infra.check.references import check_references
from infra.check.schemas import check_schemas
from infra.check.tree import Tree, read_lists, read_tree

KUBECTL = "Install it: apt-get install kubernetes-client, or https://kubernetes.io/docs/tasks/tools/"
CHECKS = (check_schemas, check_references, check_network, check_hygiene, check_placement, check_nodes)


def findings(tree: Tree) -> Iterator[str]:
    """All problems."""
    yield from tree.problems
    for check in CHECKS:
        try:
            yield from check(tree)
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # from an invalid object, reported above
            if not tree.problems and check is not check_schemas and not any(check_schemas(tree)):
                raise
            yield f"{check.__name__} stopped at an invalid object: {type(error).__name__} {error}"


def main() -> int:
    """Print the problems, and how much was checked."""
    parser = argparse.ArgumentParser(prog="python -m infra.check", description="Check the manifests.")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent, help="a copy of infra/")
    root = parser.parse_args().root
    if not (root / "nodes.yaml").is_file():
        parser.error(f"{root} is not a copy of infra/: it has no nodes.yaml")
    if shutil.which("kubectl") is None:
        print(f"Checked only the nodes: kubectl, which builds the Kustomizations, is missing. {KUBECTL}")
        found = sorted(check_nodes(Tree(root, lists=read_lists(root, []))))
        print(*found, sep="\n", end="\n" if found else "")
        return 1 if found else 0
    tree = read_tree(root)
    found = sorted(set(findings(tree)))
    print(*found, sep="\n", end="\n" if found else "")
    print(
        f"{len(tree.objects) + len(tree.studio)} objects of {len(tree.apps)} apps, {len(tree.pods)} kinds of pods, "
        f"{len(tree.lists['nodes'])} nodes: {len(found) or 'nothing'} wrong"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
