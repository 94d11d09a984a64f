"""Every pod fits a node, by day and by night, and the errors of the cluster's first description are caught."""

import copy

import pytest

from forge.capacity.serving_memory import check_serving
from forge.cluster.gpus import gpus_of
from forge.cluster.nodes import SERVING, TRAINING_HOURS, TrainingShape
from forge.core.errors import ForgeError
from forge.serving.desired import read_document
from infra.check import placement
from infra.check.placement import check_placement, hours, nodes_of_tree, place, pods_at
from infra.check.tree import Pod, Tree
from tests.capacity.test_serving_memory import LLAMA_70B, LLAMA_70B_AWQ, WEIGHTS_70B, WEIGHTS_70B_AWQ


def with_gpu(pod: Pod, gpus: int) -> Pod:
    """The same pod, with GPUs."""
    spec = copy.deepcopy(pod.spec)
    spec["containers"][0]["resources"].setdefault("limits", {})["nvidia.com/gpu"] = str(gpus)
    return Pod(**{**pod.__dict__, "spec": spec})


def test_all_pods_fit_a_node(tree: Tree) -> None:
    assert list(check_placement(tree)) == []


def test_every_gpu_is_accounted_for(tree: Tree) -> None:
    nodes = nodes_of_tree(tree)
    for hour, trainings in ((12, [TrainingShape(2, 2)]), (22, [])):
        placed, missing = place(nodes, pods_at(tree, hour), trainings)
        assert missing == []
        assert sum(node.gpus for node in placed) == 0, hour  # by day two serve and four train; by night all six serve


def test_ollama_on_a_gpu_does_not_fit_next_to_vllm(tree: Tree) -> None:
    pods = [with_gpu(pod, 1) if pod.where.endswith("Deployment ollama") else pod for pod in pods_at(tree, 12)]
    _, missing = place(nodes_of_tree(tree), pods, [])
    assert ["Deployment ollama: no node has room for it (1 GPUs" in one for one in missing] == [True]


def test_two_trainings_do_not_fit_together(tree: Tree) -> None:
    _, missing = place(nodes_of_tree(tree), pods_at(tree, 12), [TrainingShape(2, 2), TrainingShape(1, 2)])
    assert len(missing) == 1
    assert missing[0].startswith("a training of shape")


def test_every_shape_is_placed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "SHAPES", (TrainingShape(1, 8), TrainingShape(2, 2), TrainingShape(3, 1)))
    missing = list(check_placement(tree))
    assert len(missing) == 1
    assert missing[0].startswith("a training of shape 1x8: no node has room for it (8 GPUs, ")


def test_the_initial_model_fits_in_4_bits_and_not_in_bf16(tree: Tree) -> None:
    document = next(one for _, one in tree.of("ConfigMap") if one["metadata"]["name"] == "vllm-desired")
    serving = read_document(document["data"]["desired.json"], "vllm-desired").serving
    public = "meta-llama/Meta-Llama-3.1-70B-Instruct"
    assert serving.base is not None
    assert serving.find(public) == serving.base
    fit = check_serving(LLAMA_70B_AWQ, WEIGHTS_70B_AWQ, serving.engine, gpus_of(SERVING), public, concurrency=20)
    assert (fit.gpus, fit.served) == (2, 4096)
    with pytest.raises(ForgeError, match="or with 4-bit AWQ weights"):
        check_serving(LLAMA_70B, WEIGHTS_70B, serving.engine, gpus_of(SERVING), public)


def test_training_hours_and_night_windows_do_not_overlap(tree: Tree) -> None:
    windows = [
        trigger["metadata"]
        for _, one in tree.of("ScaledObject") for trigger in one["spec"]["triggers"] if trigger["type"] == "cron"
    ]  # fmt: skip
    assert windows
    for window in windows:
        assert hours(window).isdisjoint(TRAINING_HOURS)
    assert hours({"start": "0 19 * * *", "end": "5 7 * * *"}) & set(TRAINING_HOURS) == {7}
