"""Tasks refer to objects that the manifests define, and domains are isolated from one another."""

from urllib.parse import urlsplit

import pytest
from flytekit.core.context_manager import FlyteEntities
from flytekit.core.python_auto_container import PythonAutoContainerTask
from kubernetes.utils import parse_quantity

import workflows.launch_plans  # noqa: F401  imports all tasks
from forge.cluster.nodes import SHAPES, TRAINING_PRIORITY
from forge.core.settings import Settings, load_settings
from infra.check.network import connects
from infra.check.tree import Pod, Tree, at, key
from tasks.task_pods import CHECKPOINTS, METRICS, ROLLOUT, SECRETS, SETTINGS, VARIABLES

DOMAINS = ("development", "staging", "production")
TASKS = [
    one for one in FlyteEntities.entities if isinstance(one, PythonAutoContainerTask) and one.name.startswith("tasks.")
]


@pytest.fixture
def settings(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> dict[str, Settings]:
    """The settings in the ConfigMap of each namespace that has one."""
    found = {}
    for name, data in {key(one): one["data"] for _, one in tree.of("ConfigMap")}.items():
        if name.endswith(f"/{SETTINGS}"):
            with monkeypatch.context() as patch:
                for variable, value in data.items():
                    patch.setenv(variable, value)
                found[name.partition("/")[0]] = load_settings()  # raises if one is unknown or wrong
    return found


@pytest.mark.parametrize("domain", DOMAINS)
def test_settings_point_to_services(tree: Tree, settings: dict[str, Settings], domain: str) -> None:
    own = settings[f"homelab-{domain}"]
    assert own.metrics_port == METRICS
    services = {(key(one), port["port"]) for _, one in tree.services for port in one["spec"]["ports"]}
    urls = [own.s3_endpoint, own.mlflow_uri, *([own.serving_url, own.reconciler_url] if own.rollout else [])]
    for url in urls:
        name, namespace = str(urlsplit(url).hostname).split(".")
        assert (f"{namespace}/{name}", urlsplit(url).port) in services


def test_only_production_rolls_out_and_reaches_what_serves(tree: Tree, settings: dict[str, Settings]) -> None:
    served = [(one, 8000) for one in tree.selected("ml-inference", {"app.kubernetes.io/name": "vllm"})]
    served += [(one, 8001) for one in tree.selected("ml-inference", {"app.kubernetes.io/name": "vllm-reconciler"})]
    assert len(served) == 2
    for domain in DOMAINS:
        own = settings[f"homelab-{domain}"]
        (tasks,) = (pod for pod in tree.pods if pod.namespace == f"homelab-{domain}")
        reached = [to.where for to, port in served if not connects(tree, tasks, to, port)]
        if domain == "production":
            assert (own.rollout, own.serving_target, own.name_suffix) == (True, "kubernetes", "")
            assert len(reached) == 2
        else:
            assert (own.rollout, own.name_suffix) == (False, f"-{domain}")
            assert (own.serving_target, own.serving_url, own.reconciler_url) == ("local", "", "")
            assert reached == []
            assert all(refused_by_receiver(tree, tasks, to, port) for to, port in served)


def refused_by_receiver(tree: Tree, source: Pod, to: Pod, port: int) -> bool:
    """Whether the receiver's own policies refuse a pod, whatever the pod's namespace allows."""
    policies = [one for _, one in tree.of("NetworkPolicy") if one["metadata"]["namespace"] != source.namespace]
    alone = Tree(tree.root, {"ml-inference/vllm": policies}, lists=tree.lists)
    return "do not allow ingress" in connects(alone, source, to, port)


def test_rollouts_write_where_the_reconciler_reads(settings: dict[str, Settings]) -> None:
    reads = settings["ml-inference"]
    rolling = [one for name, one in settings.items() if name.startswith("homelab-") and one.rollout]
    assert rolling
    for one in rolling:
        assert (one.store, one.s3_endpoint) == (reads.store, reads.s3_endpoint)
        assert one.mlflow_uri == reads.mlflow_uri


def test_domains_share_no_store_and_no_names(settings: dict[str, Settings]) -> None:
    own = [settings[f"homelab-{domain}"] for domain in DOMAINS]
    for places in (
        [one.store for one in own],
        [one.checkpoint_copies for one in own],
        [one.name_suffix for one in own],
    ):
        assert len(set(places)) == len(DOMAINS)


def test_preflight_knows_the_quota_of_its_namespace(tree: Tree, settings: dict[str, Settings]) -> None:
    quotas = {
        one["metadata"]["namespace"]: int(one["spec"]["hard"]["requests.nvidia.com/gpu"])
        for _, one in tree.of("ResourceQuota")
    }
    for domain in DOMAINS:
        assert settings[f"homelab-{domain}"].gpu_quota == quotas[f"homelab-{domain}"]
    assert max(shape.world_size for shape in SHAPES) <= quotas["homelab-production"]


@pytest.mark.parametrize("task", TASKS, ids=[one.name.rpartition(".")[2] for one in TASKS])
def test_each_pod_is_within_the_limits_of_flyte_and_its_namespace(tree: Tree, task: PythonAutoContainerTask) -> None:
    limits = at(tree.releases["ml-platform/flyte"], "spec.values.configuration.inline.task_resources.limits")
    own = task.resources.limits
    requested = {"cpu": own.cpu, "memory": own.mem, "gpu": own.gpu or "0"}
    for name, value in requested.items():
        assert parse_quantity(str(value)) <= parse_quantity(str(limits[name])), name
    named = {"cpu": "cpu", "memory": "memory", "gpu": "nvidia.com/gpu"}
    for _, one in tree.of("LimitRange"):
        if one["metadata"]["namespace"].startswith("homelab-"):
            for limit in one["spec"]["limits"]:
                for name, value in requested.items():
                    most = (limit.get("max") or {}).get(named[name])
                    assert most is None or parse_quantity(str(value)) <= parse_quantity(str(most)), name


def test_only_production_s_rollout_account_may_change_what_is_served(tree: Tree) -> None:
    pods = {task.name.rpartition(".")[2]: task.pod_template.pod_spec for task in TASKS}
    named = {name: pod.service_account_name for name, pod in pods.items() if pod.service_account_name}
    assert named == {"roll_out": ROLLOUT, "roll_back": ROLLOUT}
    assert {name for name, pod in pods.items() if pod.automount_service_account_token is not False} == set(named)
    accounts = {key(one) for _, one in tree.of("ServiceAccount")}
    assert {f"homelab-{domain}/{ROLLOUT}" for domain in DOMAINS} <= accounts
    bound = {
        (subject["namespace"], subject["name"])
        for _, one in tree.of("RoleBinding")
        for subject in one["subjects"]
        if subject["namespace"].startswith("homelab-")
    }
    assert bound == {("homelab-production", ROLLOUT)}


@pytest.mark.parametrize("domain", DOMAINS)
def test_objects_that_pods_refer_to_exist(tree: Tree, domain: str) -> None:
    assert f"homelab-{domain}/{CHECKPOINTS}" in {key(one) for _, one in tree.of("PersistentVolumeClaim")}
    assert TRAINING_PRIORITY in {one["metadata"]["name"] for _, one in tree.of("PriorityClass")}
    keys = {f"{one['namespace']}/{one['name']}": set(one["keys"]) for one in tree.lists["external"]}
    assert keys[f"homelab-{domain}/{SECRETS}"] == set(VARIABLES)
    ports = [pod.ports for pod in tree.pods if pod.namespace == f"homelab-{domain}"]
    assert ports == [{"metrics": METRICS}]


def test_serving_has_priority_over_training_and_training_over_notebooks(tree: Tree) -> None:
    values = {one["metadata"]["name"]: one["value"] for _, one in tree.of("PriorityClass")}
    assert values["forge-serving"] > values["forge-training"] > 0 > values["forge-notebooks"]
