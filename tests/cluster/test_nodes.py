"""The node list adds up to the documented totals, and the shapes fit it."""

from pathlib import Path

import pytest

from forge.cluster import gpus, nodes
from forge.cluster.gpus import gpus_in, training_gpus
from forge.cluster.nodes import (
    LIGHT,
    SERVING,
    SHAPES,
    TRAINING,
    GPUs,
    Node,
    TrainingShape,
    all_nodes,
    check_cluster_has,
    find_shape,
    nodes_of,
    training_nodes,
)
from forge.core.errors import ForgeError

EIGHT = Node(
    name="eight", role=TRAINING, cores=192, memory_gib=2016, disk_gb=8000, gpus=GPUs(count=8, product="H100-80GB")
)


def test_the_cluster_is_the_documented_one() -> None:
    cluster = all_nodes()
    assert len(cluster) == len({node.name for node in cluster}) == 8
    assert sum(node.gpus.count for node in cluster if node.gpus) == 6
    workers = [node for node in cluster if node.role != "control-plane"]
    assert sum(node.cores for node in workers) == 384
    assert sum(node.memory_gib for node in workers) == 1536
    assert sum(node.disk_gb for node in workers) == 14_000
    assert {node.pool for node in nodes_of(TRAINING)} == {"primary", "secondary"}
    assert nodes_of(SERVING)
    assert nodes_of(LIGHT)


def test_nodes_with_gpus_are_labelled_and_tainted() -> None:
    for node in all_nodes():
        assert ("gpu-type" in node.labels) == bool(node.gpus) == bool(node.taints), node.name


def test_the_cluster_holds_every_shape() -> None:
    for shape in SHAPES:
        assert find_shape(shape.nodes, shape.nproc_per_node) == shape
        check_cluster_has(shape)


def test_other_shapes_are_refused_with_the_fix() -> None:
    with pytest.raises(ForgeError) as caught:
        find_shape(2, 1)
    assert caught.value.where == "training.nodes 2 with training.nproc_per_node 1"
    assert caught.value.fix.startswith("take one of 1x1, 1x2, 2x2 (nodes x processes per node), or add it to SHAPES")


def test_shapes_that_the_nodes_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, able in ((TrainingShape(1, 8), 0), (TrainingShape(3, 2), 2)):
        with pytest.raises(ForgeError, match=f": {able} of the cluster's nodes of role training have .*; lower"):
            check_cluster_has(shape)
    monkeypatch.setattr(nodes, "all_nodes", lambda: (*all_nodes(), EIGHT))
    check_cluster_has(TrainingShape(1, 8))
    with pytest.raises(ForgeError, match="1 of the cluster's nodes of role training have 8 GPUs"):
        check_cluster_has(TrainingShape(2, 8))


def test_a_shape_runs_on_the_smallest_nodes_of_one_product_that_hold_it() -> None:
    everything = [EIGHT, *all_nodes()]
    names = [node.name for node in nodes_of(TRAINING)]
    assert [node.name for node in training_nodes(TrainingShape(2, 2), everything)] == names
    assert training_nodes(TrainingShape(1, 8), everything) == [EIGHT]
    assert [node.name for node in training_nodes(TrainingShape(3, 2), everything)] == names, "not a mix of products"
    four = EIGHT.model_copy(update={"name": "four", "gpus": GPUs(count=4, product="H100-80GB")})
    assert training_nodes(TrainingShape(2, 4), [*everything, four]) == [four, EIGHT]
    assert training_nodes(TrainingShape(1, 16), everything) == []


def test_the_gpus_of_a_training_are_those_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123456789")
    monkeypatch.setattr(nodes, "all_nodes", lambda: (*all_nodes(), EIGHT))
    assert training_gpus(TrainingShape(1, 2)) == [gpus.GPUS["A100-40GB"]] * 2
    assert training_gpus(TrainingShape(1, 8)) == [gpus.GPUS["H100-80GB"]] * 8
    with pytest.raises(ForgeError, match=r"infra/nodes.yaml: eight: GPU product B300 is unknown; take one of A100"):
        gpus_in(EIGHT.model_copy(update={"gpus": GPUs(count=8, product="B300")}))


@pytest.mark.parametrize("text", ["nodes: [{name: x}]", "[]", "nodes: [", "{}"])
def test_a_wrong_node_list_is_an_error(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nodes.yaml").write_text(text)
    monkeypatch.setattr(nodes, "shipped", lambda name: tmp_path / "nodes.yaml")
    with pytest.raises(ForgeError, match=r"nodes.yaml: is no list of nodes \("):
        all_nodes.__wrapped__()


def test_the_share_of_a_node_is_proportional_to_its_gpus() -> None:
    node = nodes_of(TRAINING)[0]
    assert node.share(1) == (30, 120)
    assert node.share(2) == node.share(8) == (60, 240)
    assert EIGHT.share(2) == (47, 500)
