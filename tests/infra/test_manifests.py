"""vLLM's manifests are valid, agree with each other and the code, and grant exactly the API calls that it makes."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.core.settings import load_settings
from forge.serving.engine import MODULE, NAMES, VARIABLES
from forge.serving.kubernetes_target import CALLS, LISTEN
from tests.serving.fake_cluster import (
    MANIFESTS,
    NAMESPACE,
    NEW,
    OLD,
    Place,
    check,
    fake_place,
    manifest,
    manifests,
    wanted,
)

ALL = manifests()
Request = tuple[str, str, str]  # verb, resource, name ("": any)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A cluster that records its requests."""
    with fake_place(tmp_path, monkeypatch) as one:
        yield one


@pytest.mark.parametrize("one", ALL, ids=[f"{one['kind']}-{one['metadata']['name']}" for one in ALL])
def test_every_object_is_valid(one: dict[str, Any]) -> None:
    check(one)  # a kind without a schema raises
    assert one["metadata"]["namespace"] == NAMESPACE


def test_every_file_is_listed() -> None:
    files = {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"])


def pod_labels() -> list[dict[str, str]]:
    """The labels of each Deployment's pods."""
    return [one["spec"]["template"]["metadata"]["labels"] for one in ALL if one["kind"] == "Deployment"]


@pytest.mark.parametrize("one", [one for one in ALL if one["kind"] == "Deployment"])
def test_deployments_select_their_own_pods(one: dict[str, Any]) -> None:
    selector = one["spec"]["selector"]["matchLabels"]
    assert [selector.items() <= labels.items() for labels in pod_labels()].count(True) == 1
    assert selector.items() <= one["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", ["vllm", "vllm-reconciler"])
def test_services_and_policies_select_the_pods_of_their_name(name: str) -> None:
    template = manifest("Deployment", name)["spec"]["template"]
    service, policy = manifest("Service", name)["spec"], manifest("NetworkPolicy", name)["spec"]
    for selector in (service["selector"], policy["podSelector"]["matchLabels"]):
        assert selector.items() <= template["metadata"]["labels"].items()
    container = template["spec"]["containers"][0]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert [ports[one["targetPort"]] for one in service["ports"]] == [one["port"] for one in service["ports"]]
    open_ports = [one["port"] for rule in policy["ingress"] for one in rule["ports"]]
    assert service["ports"][0]["port"] in open_ports
    probes = [one["httpGet"]["port"] for name, one in container.items() if name.endswith("Probe")]
    assert len(probes) >= 2
    assert set(probes) <= set(ports)


def test_vllm_starts_as_the_code_expects() -> None:
    spec = manifest("Deployment", "vllm")["spec"]
    vllm = spec["template"]["spec"]["containers"][0]
    variables = {one["name"]: one["value"] for one in vllm["env"]}
    home = next(one["value"] for one in reconciler()["env"] if one["name"] == "FORGE_HOME")
    assert vllm["command"][1:] == ["-m", MODULE]
    assert "args" not in vllm
    assert "replicas" not in spec
    assert variables.items() >= VARIABLES.items()
    assert variables[NAMES] == f"{home}/serving/names.json"
    assert LISTEN[-1] == str(vllm["ports"][0]["containerPort"])
    mounted = [one["mountPath"] for one in (*vllm["volumeMounts"], *reconciler()["volumeMounts"])]
    assert mounted.count(home) == 2
    assert variables["PYTHONPATH"] in mounted
    assert spec["template"]["spec"]["enableServiceLinks"] is False
    assert (
        vllm["startupProbe"]["failureThreshold"] * vllm["startupProbe"]["periodSeconds"]
        < spec["progressDeadlineSeconds"]
    )


def test_images_are_pinned_to_this_version() -> None:
    version = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]["version"]
    pods = [one["spec"]["template"]["spec"] for one in ALL if one["kind"] == "Deployment"]
    images = {one["image"] for pod in pods for one in (*pod["containers"], *pod.get("initContainers", []))}
    assert images == {f"forge-pipeline:{version}", "vllm/vllm-openai:v0.32.0"}


def test_reconciler_gets_valid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in manifest("ConfigMap", "forge-settings")["data"].items():
        monkeypatch.setenv(name, value)
    for one in reconciler()["env"]:
        if one["name"].startswith("FORGE_"):
            monkeypatch.setenv(one["name"], one.get("value", "from a Secret"))
    settings = load_settings()  # raises for an unknown setting
    assert settings.serving_target == "kubernetes"
    assert settings.serving_namespace == NAMESPACE
    assert [settings.reconciler_port] == [one["containerPort"] for one in reconciler()["ports"]]
    for url, name in ((settings.serving_url, "vllm"), (settings.reconciler_url, "vllm-reconciler")):
        port = manifest("Service", name)["spec"]["ports"][0]["port"]
        assert url == f"http://{name}.{NAMESPACE}.svc:{port}"


def reconciler() -> dict[str, Any]:
    """The reconciler's container."""
    return dict(manifest("Deployment", "vllm-reconciler")["spec"]["template"]["spec"]["containers"][0])


def granted(role: str) -> Iterator[tuple[Request, str]]:
    """Each request that a Role grants, with its API group."""
    for rule in manifest("Role", role)["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    for name in rule.get("resourceNames", [""]):
                        yield (verb, resource, name), group


def assert_exactly(role: str, requests: set[Request]) -> None:
    """The Role grants exactly these requests."""
    grants = {request for request, _ in granted(role)}
    used = {(verb, resource, name if (verb, resource, name) in grants else "") for verb, resource, name in requests}
    assert used - grants == set(), "used, but not granted"
    assert grants - used == set(), "granted, but never used"


def test_reconciler_has_exactly_the_permissions_it_uses(fake: Place) -> None:
    fake.document.write(wanted(OLD), "")  # written by a rollout
    fake.fake.requests_seen.clear()
    desired, revision = fake.document.read()
    fake.document.write(desired.model_copy(update={"generation": 2}), revision)
    fake.serve(OLD)
    fake.fail("crashing", NEW)
    fake.server.stop()
    assert_exactly("vllm-reconciler", set(fake.fake.requests_seen))


def test_rollout_has_exactly_the_permissions_it_uses(fake: Place) -> None:
    fake.document.write(wanted(OLD), "")
    fake.document.write(wanted(NEW, 2), fake.document.read()[1])
    assert_exactly("forge-rollout", set(fake.fake.requests_seen))


def test_roles_use_the_api_groups_of_the_client() -> None:
    groups = {"CoreV1Api": "", "AppsV1Api": "apps"}
    for role in ("vllm-reconciler", "forge-rollout"):
        for (verb, resource, _), group in granted(role):
            assert groups[CALLS[verb, resource][0]] == group


def test_roles_are_bound_to_the_accounts_that_use_them() -> None:
    account = manifest("Deployment", "vllm-reconciler")["spec"]["template"]["spec"]["serviceAccountName"]
    assert manifest("ServiceAccount", account)
    bound = manifest("RoleBinding", "vllm-reconciler")
    assert bound["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]
    for name in ("vllm-reconciler", "forge-rollout"):
        assert manifest("Role", manifest("RoleBinding", name)["roleRef"]["name"])
