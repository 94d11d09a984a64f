"""The node list adds up to what is documented, and shapes fit it."""

import pytest

from forge.cluster.nodes import LIGHT, SERVING, SHAPES, TRAINING, all_nodes, check_cluster_has, find_shape, nodes_of
from forge.core.errors import ForgeError


def test_the_cluster_is_the_documented_one() -> None:
    nodes = all_nodes()
    assert len(nodes) == len({node.name for node in nodes}) == 8
    assert sum(node.gpus.count for node in nodes if node.gpus) == 6
    workers = [node for node in nodes if node.role != "control-plane"]
    assert sum(node.cores for node in workers) == 384
    assert sum(node.memory_gib for node in workers) == 1536
    assert sum(node.disk_gb for node in workers) == 14_000
    assert {node.pool for node in nodes_of(TRAINING)} == {"primary", "secondary"}
    assert nodes_of(SERVING)
    assert nodes_of(LIGHT)


def test_nodes_with_gpus_say_so_and_keep_others_away() -> None:
    for node in all_nodes():
        assert ("gpu-type" in node.labels) == bool(node.gpus) == bool(node.taints), node.name


def test_shapes() -> None:
    for shape in SHAPES:
        assert find_shape(shape.nodes, shape.nproc_per_node) == shape
        check_cluster_has(shape)
    with pytest.raises(ForgeError, match="take one of 1x1, 1x2, 2x2"):
        find_shape(2, 1)


def test_a_share_of_a_node_is_what_its_gpus_are_of_all() -> None:
    node = nodes_of(TRAINING)[0]
    assert node.share(1) == (30, 120)
    assert node.share(2) == (60, 240)
