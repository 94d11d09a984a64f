"""The document and vLLM on a cluster: a fake one, and if FORGE_TEST_KUBECONFIG is set, a real one too."""

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.core.contracts import Engine
from forge.core.errors import ForgeError
from forge.serving.desired import Conflict, Desired, Failed
from forge.serving.engine import arguments
from forge.serving.kubernetes_target import LISTEN, PREVIOUS, ConfigMapDocument, Unreachable, open_cluster
from forge.serving.vllm_pods import SERVES
from tests.serving.fake_cluster import (
    CONFIGMAPS,
    DEPLOYMENTS,
    DOCUMENT,
    ENGINE,
    LOST,
    NAMESPACE,
    NEW,
    OLD,
    PODS,
    Place,
    check,
    fake_place,
    manifest,
    wanted,
    write_package,
)

WHERE = "Deployment vllm in namespace ml-inference"
NOTICING = "the controller to notice the change of the Deployment vllm"
CHANGED = "the Deployment vllm was changed by another writer; it is read again"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The fake cluster; nothing serves yet."""
    with fake_place(tmp_path, monkeypatch) as one:
        yield one


@contextlib.contextmanager
def real_place(tmp_path: Path) -> Iterator[Place]:
    """A namespace of its own on the cluster of FORGE_TEST_KUBECONFIG."""
    from kubernetes import client

    cluster = open_cluster()
    core, apps = client.CoreV1Api(cluster.api), client.AppsV1Api(cluster.api)
    namespace = f"forge-test-{uuid.uuid4().hex[:8]}"
    deployment = manifest("Deployment", "vllm")
    deployment["metadata"]["namespace"] = namespace
    deployment["spec"]["template"]["spec"]["nodeSelector"] = {"forge-test": namespace}  # matches no node
    del deployment["spec"]["template"]["spec"]["runtimeClassName"]
    core.create_namespace({"metadata": {"name": namespace}})
    try:
        apps.create_namespaced_deployment(namespace, deployment)

        def change() -> None:
            body = {"metadata": {"annotations": {"someone": uuid.uuid4().hex}}}
            apps.patch_namespaced_deployment("vllm", namespace, body)

        yield Place(cluster, namespace, write_package(tmp_path), change)
    finally:
        core.delete_namespace(namespace)


@pytest.fixture(params=["fake", "real"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The fake cluster, and a real API server."""
    if request.param == "fake":
        yield request.getfixturevalue("fake")
        return
    if not (given := os.environ.get("FORGE_TEST_KUBECONFIG")):
        pytest.skip("FORGE_TEST_KUBECONFIG is not set: a file that may create a namespace on a Kubernetes cluster")
    monkeypatch.setenv("KUBECONFIG", given)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with real_place(tmp_path) as one:
        yield one


# The document.


def test_the_document_is_empty_until_it_is_written(place: Place) -> None:
    assert place.document.read() == (Desired(), "")
    place.document.write(wanted(NEW), "")
    read, revision = place.document.read()
    assert read == wanted(NEW)
    place.document.write(wanted(OLD, 2), revision)
    assert place.document.read()[0] == wanted(OLD, 2)


def test_of_two_writers_one_gets_a_conflict(place: Place) -> None:
    place.document.write(wanted(NEW), "")
    with pytest.raises(Conflict):
        place.document.write(wanted(OLD), "")
    _, revision = place.document.read()
    place.document.write(wanted(OLD, 2), revision)
    with pytest.raises(Conflict):
        place.document.write(wanted(NEW, 3), revision)
    assert place.document.read()[0] == wanted(OLD, 2)


@pytest.mark.parametrize("verb", ["create", "patch"])
def test_a_write_whose_response_was_lost_is_not_a_conflict(fake: Place, verb: str) -> None:
    revision = ""
    if verb == "patch":
        fake.document.write(wanted(OLD), "")
        revision = fake.document.read()[1]
    fake.fake.faults.append((verb, "configmaps", LOST))
    fake.document.write(wanted(NEW, 2), revision)  # sent, sent again, refused, read
    assert fake.fake.requests_seen[-3:-1] == [(verb, "configmaps", DOCUMENT if verb == "patch" else "")] * 2
    assert fake.document.read()[0] == wanted(NEW, 2)


def test_a_deleted_document_is_a_conflict(fake: Place) -> None:
    fake.document.write(wanted(OLD), "")
    _, revision = fake.document.read()
    fake.fake.objects[CONFIGMAPS, NAMESPACE, DOCUMENT].delete()
    with pytest.raises(Conflict):
        fake.document.write(wanted(NEW), revision)


def test_the_error_for_a_broken_document_names_it(fake: Place) -> None:
    fake.document.write(wanted(OLD), "")
    fake.fake.edit(lambda one: one.update(data={"desired.json": "{}}"}), CONFIGMAPS, DOCUMENT)
    with pytest.raises(ForgeError, match="ConfigMap vllm-desired in namespace ml-inference: not a valid description"):
        fake.document.read()


def test_an_empty_config_map_does_not_stop_serving(fake: Place) -> None:
    fake.document.write(wanted(OLD), "")
    fake.fake.edit(lambda one: one.pop("data"), CONFIGMAPS, DOCUMENT)
    with pytest.raises(ForgeError, match="not a valid description of what to serve"):
        fake.document.read()


def test_a_denied_write_names_the_role_to_bind(fake: Place) -> None:
    fake.fake.deny("create", "configmaps")
    with pytest.raises(ForgeError) as refused:
        fake.document.write(wanted(NEW), "")
    assert refused.value.message == (
        "not allowed to create configmaps in namespace ml-inference (configmaps is forbidden: User "
        '"system:serviceaccount:ml-inference:vllm-reconciler" cannot create resource "configmaps"); bind the Role '
        "forge-rollout (the reconciler: vllm-reconciler) of infra/apps/ml-inference/vllm/rbac.yaml to this process's "
        "ServiceAccount"
    )


def test_a_write_survives_a_restart_of_the_api_server(fake: Place) -> None:
    fake.fake.answer("create", "configmaps", 503, times=3)
    fake.fake.answer("create", "configmaps", 429)
    fake.document.write(wanted(NEW), "")
    fake.fake.answer("get", "configmaps", 500, times=2)
    assert fake.document.read()[0] == wanted(NEW)


def test_the_error_for_an_unreachable_api_server_names_it(fake: Place) -> None:
    fake.cluster.patience = 0
    fake.fake.answer("get", "configmaps", 503)
    with pytest.raises(Unreachable, match=r"the API server http://127.0.0.1:\d+ answers 503 to get configmaps vllm-d"):
        fake.document.read()
    assert fake.running is not None
    fake.running.stop()
    with pytest.raises(Unreachable, match=r"does not answer to get configmaps vllm-desired .*Connection refused"):
        fake.document.read()


def test_a_connection_cut_during_the_tls_handshake_is_retried(fake: Place) -> None:
    file = Path(os.environ["KUBECONFIG"])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = f"127.0.0.1:{listening.getsockname()[1]}"
        assert fake.running is not None
        file.write_text(file.read_text().replace(f"http://127.0.0.1:{fake.running.port}", f"https://{server}"))
        threading.Thread(target=lambda: listening.accept()[0].close(), daemon=True).start()
        with pytest.raises(Unreachable, match=f"https://{server} does not answer to get configmaps"):
            ConfigMapDocument(open_cluster(patience=0), NAMESPACE, DOCUMENT).read()


def test_rejected_credentials_are_reported(fake: Place) -> None:
    fake.fake.answer("get", "configmaps", 401)
    with pytest.raises(ForgeError, match=r"rejects the credentials \(401\); renew those in KUBECONFIG"):
        fake.document.read()


# Access.


def test_the_error_without_a_cluster_says_how_to_set_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(ForgeError, match="this is not a pod, and KUBECONFIG is not set; set KUBECONFIG"):
        open_cluster()
    for content in (None, "", "{broken"):
        if content is not None:
            (tmp_path / "config").write_text(content)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        with pytest.raises(ForgeError, match=r"config: gives no access to a cluster \(.*\); fix it"):
            open_cluster()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ForgeError, match="the pod's ServiceAccount: gives no access to a cluster"):
        open_cluster()


def test_importing_the_module_imports_no_client() -> None:
    code = "import sys, forge.serving.kubernetes_target; print('kubernetes' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# vLLM.


def test_a_base_is_served(fake: Place) -> None:
    waited = fake.serve()
    pod = fake.fake.pods[0]["metadata"]["name"]
    assert waited == [NOTICING, f"a pod of {WHERE} to be created", f"pod {pod}: Pending", f"pod {pod}: Running"]
    template = fake.deployment["spec"]["template"]
    assert template["spec"]["containers"][0]["args"] == [*LISTEN, *arguments(NEW, fake.package, ENGINE)]
    assert template["metadata"]["annotations"][SERVES] == NEW.versioned
    assert fake.deployment["spec"]["replicas"] == 1


def test_the_previous_base_stops_first_and_is_recorded(fake: Place) -> None:
    fake.serve(OLD)
    old = fake.fake.pods[0]["metadata"]["name"]
    waited = fake.serve(NEW)
    assert waited[:3] == [NOTICING, f"pod {old} to terminate", f"a pod of {WHERE} to be created"]
    before = json.loads(fake.deployment["metadata"]["annotations"][PREVIOUS])
    assert before == {"serves": OLD.versioned, "args": [*LISTEN, *arguments(OLD, fake.package, ENGINE)]}


def test_a_deployment_as_desired_is_left_alone(fake: Place) -> None:
    fake.serve()
    patches, found = fake.fake.count("patch", "deployments"), copy.deepcopy(fake.fake.deployment)
    assert [fake.ensure(), fake.ensure()] == ["", ""]
    assert fake.fake.count("patch", "deployments") == patches
    assert fake.fake.deployment == found


def test_other_options_replace_the_pod(fake: Place) -> None:
    fake.serve()
    assert fake.ensure(engine=Engine(tensor_parallel=2, max_model_len=4096)) == NOTICING
    assert fake.deployment["spec"]["template"]["spec"]["containers"][0]["args"][-4:] == [
        "--max-model-len",
        "4096",
        "--tensor-parallel-size",
        "2",
    ]


def test_stop_and_start_again(fake: Place) -> None:
    fake.serve()
    fake.server.stop()
    fake.fake.settle()
    assert fake.fake.pods == []
    patches = fake.fake.count("patch", "deployments")
    fake.server.stop()
    assert fake.fake.count("patch", "deployments") == patches
    fake.serve()
    assert len(fake.fake.pods) == 1
    assert PREVIOUS not in fake.deployment["metadata"].get("annotations", {})


def test_a_change_of_another_writer_is_kept(place: Place) -> None:
    patch = place.cluster.patch

    def after_another_writer(*arguments: Any) -> Any:
        place.another_writer()
        place.cluster.patch = patch  # type: ignore[method-assign]
        return patch(*arguments)

    place.cluster.patch = after_another_writer  # type: ignore[method-assign]
    assert place.ensure() == CHANGED
    assert "someone" in place.deployment["metadata"]["annotations"]
    for _ in range(20):  # a controller may be another writer too
        if place.ensure() != CHANGED:
            break
    assert "someone" in place.deployment["metadata"]["annotations"]
    assert place.deployment["spec"]["template"]["metadata"]["annotations"][SERVES] == NEW.versioned


def test_a_patch_whose_response_was_lost_is_not_repeated(fake: Place) -> None:
    fake.fake.faults.append(("patch", "deployments", LOST))
    assert fake.ensure() == CHANGED
    patches = fake.fake.count("patch", "deployments")
    fake.serve()
    assert fake.fake.count("patch", "deployments") == patches


def test_an_invalid_change_fails(fake: Place) -> None:
    fake.fake.answer("patch", "deployments", 422, "spec.template: Invalid value")
    with pytest.raises(Failed, match=f"{WHERE}: the change is not valid; .*spec.template: Invalid value"):
        fake.ensure()


def test_an_unreachable_api_server_is_waited_for(fake: Place) -> None:
    assert fake.running is not None
    fake.ensure()
    fake.fake.answer("get", "deployments", 503, times=3)
    assert fake.ensure() == NOTICING
    fake.cluster.patience = 0
    fake.running.stop()
    assert "does not answer to get deployments vllm in namespace ml-inference" in fake.ensure()
    fake.running.start()
    fake.serve()


def test_a_missing_deployment_fails(fake: Place) -> None:
    fake.fake.objects[DEPLOYMENTS, NAMESPACE, "vllm"].delete()
    with pytest.raises(
        Failed, match=f"{WHERE}: does not exist; create it: kubectl apply -k infra/apps/ml-inference/vllm"
    ):
        fake.ensure()
    fake.server.stop()  # there is nothing to stop


def test_a_deployment_without_vllm_fails(fake: Place) -> None:
    fake.fake.edit(lambda one: one["spec"]["template"]["spec"]["containers"][0].update(name="ollama"))
    with pytest.raises(Failed, match="has no container vllm"):
        fake.ensure()


@pytest.mark.parametrize(
    ("verb", "resource"), [("get", "deployments"), ("patch", "deployments"), ("list", "pods"), ("list", "replicasets")]
)
def test_denied_requests_name_the_role(fake: Place, verb: str, resource: str) -> None:
    fake.fake.deny(verb, resource)
    with pytest.raises(Failed, match=rf"not allowed to {verb} {resource}.* bind the Role vllm-reconciler of infra/"):
        fake.serve()


# vLLM that never serves.


def test_a_crash_is_reported_with_its_log(fake: Place) -> None:
    error = fake.fail("crashing")
    pod = fake.fake.pods[0]["metadata"]["name"]
    assert error == (
        f"{WHERE}: container vllm of pod {pod} keeps crashing (3 restarts; last exit code 1 Error); its log says "
        "why\n  Traceback (most recent call last):\n  ValueError: the weights are not a model"
    )


def test_an_unreadable_log_is_mentioned(fake: Place) -> None:
    fake.fake.deny("get", "pods/log")
    error = fake.fail("crashing")
    assert "last exit code 1 Error" in error
    assert error.endswith("(its log cannot be read here; see kubectl logs --previous)")


def test_killed_for_memory(fake: Place) -> None:
    error = fake.fail("killed")
    assert "last exit code 137 OOMKilled); it ran out of memory: raise resources.limits.memory\n" in error


def test_a_first_crash_is_waited_for(fake: Place) -> None:
    fake.ensure()
    fake.fake.mode = "ended_once"
    fake.fake.settle()
    assert fake.ensure().endswith(": vllm exited with code 1 and is restarted")


def test_a_missing_image(fake: Place) -> None:
    error = fake.fail("without_image")
    pod = fake.fake.pods[0]["metadata"]["name"]
    assert error == (
        f"{WHERE}: the image vllm/vllm-openai:v0.32.0 of container vllm of pod {pod} cannot be pulled "
        '(ImagePullBackOff: Back-off pulling image "vllm/vllm-openai:v0.32.0": not found); fix the image\'s name, or '
        "the node's access to its registry"
    )
    assert "the image forge-pipeline:0.1.0 of container middleware" in fake.fail("without_middleware", OLD)


def test_a_full_node(fake: Place) -> None:
    error = fake.fail("without_a_node")
    assert "fits no node" in error
    assert "(0/8 nodes are available: 1 Insufficient nvidia.com/gpu, 7 node(s) didn't match" in error
    assert "other pods hold the GPUs that it needs: find them with kubectl get pods -A -o wide, and stop them" in error


def test_a_quota(fake: Place) -> None:
    error = fake.fail("quota")
    assert error == (
        f"{WHERE}: its pod is not admitted (pods is forbidden: exceeded quota: gpus, requested: "
        "requests.nvidia.com/gpu=2, limited to 0); raise the namespace's quota, or fix the pod template"
    )


def test_never_ready(fake: Place) -> None:
    fake.ensure()
    fake.fake.mode = "silent"
    fake.fake.settle()
    pod = fake.fake.pods[0]["metadata"]["name"]
    assert fake.ensure() == f"pod {pod}: vllm to be ready"
    fake.fake.pass_the_deadline()
    with pytest.raises(Failed) as failed:
        fake.ensure()
    assert str(failed.value) == (
        f"{WHERE}: not ready within 1200 s: pod {pod}: vllm to be ready (containers with unready status: [vllm]); see "
        f"kubectl describe pod {pod}, or raise progressDeadlineSeconds\n  Traceback (most recent call last):\n"
        "  ValueError: the weights are not a model"
    )


@pytest.mark.parametrize("mode", ["crashing", "without_image", "without_a_node", "quota", "silent"])
def test_a_failure_of_the_previous_template_does_not_count(fake: Place, mode: str) -> None:
    fake.ensure(OLD)
    fake.fake.mode = mode
    fake.fake.settle()
    fake.fake.pass_the_deadline()
    with pytest.raises(Failed):
        fake.ensure(OLD)
    fake.serve(NEW)  # raises no Failed


def test_a_deadline_that_an_earlier_pod_has_missed_does_not_count(fake: Place) -> None:
    fake.ensure()
    fake.fake.mode = "silent"
    fake.fake.settle()
    fake.fake.pass_the_deadline()
    fake.server.stop()
    fake.fake.settle()
    assert fake.ensure() == NOTICING
    fake.fake.settle()
    assert fake.ensure().endswith("vllm to be ready")


def test_a_terminating_pod_does_not_count(fake: Place) -> None:
    fake.fail("crashing")
    pod = fake.fake.pods[0]["metadata"]["name"]
    ending = {"deletionTimestamp": fake.fake.now(), "deletionGracePeriodSeconds": 90}
    fake.fake.edit(lambda one: one["metadata"].update(ending), PODS, pod)  # as kubectl delete pod
    assert fake.ensure() == f"pod {pod} to terminate"


def test_going_back_after_a_failure(fake: Place) -> None:
    fake.serve(OLD)
    fake.fail("crashing", NEW)
    fake.serve(OLD)
    assert [one["metadata"]["annotations"][SERVES] for one in fake.fake.pods] == [OLD.versioned]


def test_all_objects_sent_are_valid(fake: Place) -> None:
    fake.document.write(wanted(NEW), "")
    fake.serve(OLD)
    fake.serve(NEW)
    for resource, name in ((CONFIGMAPS, DOCUMENT), (DEPLOYMENTS, "vllm")):
        check(fake.fake.find(resource, name))
