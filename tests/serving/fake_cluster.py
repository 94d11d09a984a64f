"""A fake Kubernetes API server, with a controller, scheduler and kubelet for one Deployment.

kmock provides the HTTP server and parses requests. The rest is implemented here: JSON Patch, resourceVersion and
generation, label selectors and logs. Every stored object is validated against its schema. `advance` is one step of the
controllers, so tests see each state in between without waiting.
"""

import asyncio
import contextlib
import copy
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp.web
import jsonpatch
import kubernetes_validate
import pytest
import yaml
from kmock import KubernetesEmulator, KubernetesError, Server
from kmock import action as Action
from kmock import resource as Resource

from forge.core.contracts import Engine
from forge.serving.desired import Desired, Failed, Served, Serving
from forge.serving.kubernetes_target import Cluster, ConfigMapDocument, KubernetesServer, open_cluster
from forge.serving.vllm_pods import HASH

MANIFESTS = Path(__file__).parent.parent.parent / "infra" / "apps" / "ml-inference" / "vllm"
NAMESPACE = "ml-inference"
KUBERNETES = "1.32"
CONFIGMAPS, PODS = Resource("", "v1", "configmaps"), Resource("", "v1", "pods")
DEPLOYMENTS, REPLICASETS = Resource("apps", "v1", "deployments"), Resource("apps", "v1", "replicasets")
VERBS = {
    Action.FETCH: "get",
    Action.LIST: "list",
    Action.CREATE: "create",
    Action.UPDATE: "patch",
    Action.DELETE: "delete",
}
OLD = Served(name="dates", version="1", uri="s3://models/dates/1", digest="a" * 64)
NEW = Served(name="dates", version="2", uri="s3://models/dates/2", digest="b" * 64)
ENGINE = Engine(tensor_parallel=2)
DOCUMENT = "vllm-desired"
Object = dict[str, Any]
Fault = Callable[[Any], aiohttp.web.Response | None]


def manifests() -> list[Object]:
    """All objects of infra/apps/ml-inference/vllm."""
    listed = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"]
    return [one for name in listed for one in yaml.safe_load_all((MANIFESTS / name).read_text())]


def manifest(kind: str, name: str) -> Object:
    """One of them, a copy."""
    return next(one for one in manifests() if one["kind"] == kind and one["metadata"]["name"] == name)


def check(one: Object) -> None:
    """Validate an object as an API server does; raises SchemaNotFoundError for a kind without a schema."""
    kubernetes_validate.validate(one, KUBERNETES, strict=True)


class FakeCluster(KubernetesEmulator):
    """The API server and its controllers. `mode` selects the fate of a new pod: one of the methods `pod_*`."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = "ready"
        self.requests_seen: list[tuple[str, str, str]] = []  # (verb, resource, name), in RBAC's terms
        self.faults: list[tuple[str, str, Fault]] = []
        self.log = "Traceback (most recent call last):\nValueError: the weights are not a model"
        self.versions, self.seconds = itertools.count(100), itertools.count()
        self.put(DEPLOYMENTS, manifest("Deployment", "vllm"))
        self.deployment["spec"].setdefault("replicas", 1)  # as the API server does

    # For tests to read and to change.

    @property
    def deployment(self) -> Object:
        """The Deployment as it is stored."""
        return self.find(DEPLOYMENTS, "vllm")

    @property
    def pods(self) -> list[Object]:
        """The pods."""
        return self.all(PODS)

    def find(self, resource: Resource, name: str) -> Object:
        """An object as it is stored."""
        return self.objects[resource, NAMESPACE, name].raw

    def all(self, resource: Resource) -> list[Object]:
        """The objects of a resource."""
        found = [one for key, one in self.objects.items() if key[0] == resource]
        return [one.raw for one in found if not one.deleted]

    def put(self, resource: Resource, one: Object) -> Object:
        """Store an object as another writer would: with a new resourceVersion, and a new generation if its spec is."""
        metadata = one["metadata"]
        key = (resource, NAMESPACE, metadata["name"])
        before = self.objects[key].raw if key in self.objects and not self.objects[key].deleted else None
        metadata |= {
            "namespace": NAMESPACE,
            "resourceVersion": str(next(self.versions)),
            "uid": f"uid-{metadata['name']}",
        }
        metadata.setdefault("creationTimestamp", self.now())
        if "spec" in one:
            changed = before is not None and before["spec"] != one["spec"]
            metadata["generation"] = metadata.get("generation", 1) + changed
        check(one)
        self.objects[key] = one
        return one

    def edit(self, change: Callable[[Object], None], resource: Resource = DEPLOYMENTS, name: str = "vllm") -> None:
        """Change an object as another writer would."""
        one = copy.deepcopy(self.find(resource, name))
        change(one)
        self.put(resource, one)

    def now(self) -> str:
        """A time later than the previous one."""
        minutes, seconds = divmod(next(self.seconds), 60)
        return f"2026-01-01T00:{minutes:02}:{seconds:02}Z"

    def count(self, verb: str, resource: str) -> int:
        """How many such requests there were."""
        return sum(seen[:2] == (verb, resource) for seen in self.requests_seen)

    # Faults.

    def before(self, verb: str, resource: str, change: Callable[[], Any]) -> None:
        """Change something just before the next such request is handled."""

        def fault(_: Any) -> None:
            change()

        self.faults.append((verb, resource, fault))

    def answer(self, verb: str, resource: str, status: int, reason: str = "Unavailable", times: int = 1) -> None:
        """Answer the next such requests with an error."""

        def fault(request: Any) -> aiohttp.web.Response:
            body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
            return aiohttp.web.json_response(body | {"message": reason, "code": status}, status=status)

        self.faults += [(verb, resource, fault)] * times

    def deny(self, verb: str, resource: str) -> None:
        """Deny the next such request, as RBAC does."""
        user = "system:serviceaccount:ml-inference:vllm-reconciler"
        self.answer(verb, resource, 403, f'{resource} is forbidden: User "{user}" cannot {verb} resource "{resource}"')

    # The API server.

    async def _handle(self, request: Any) -> aiohttp.web.StreamResponse:
        resource = request.resource.plural + (f"/{request.subresource}" if request.subresource else "")
        verb = VERBS[request.action]
        name = request.name or ""
        self.requests_seen.append((verb, resource, name))
        lost = False
        for fault in [one for one in self.faults if one[:2] == (verb, resource)][:1]:
            self.faults.remove(fault)
            answer = fault[2](request)
            if answer is not None:
                return answer
            lost = fault[2] is LOST
        answer = self._answer(request, verb, resource, name)
        if lost:
            request._raw_request.transport.close()
        return answer

    def _answer(self, request: Any, verb: str, resource: str, name: str) -> aiohttp.web.Response:
        if resource == "pods/log":
            return aiohttp.web.Response(text=self.log, content_type="text/plain")
        kind = request.resource
        if verb == "list":
            wanted = dict(pair.split("=") for pair in request.params["labelSelector"].split(","))
            found = [one for one in self.all(kind) if wanted.items() <= one["metadata"]["labels"].items()]
            return aiohttp.web.json_response({"kind": "List", "apiVersion": "v1", "metadata": {}, "items": found})
        if verb == "create":
            name = request.data["metadata"]["name"]
        key = (kind, NAMESPACE, name)
        there = key in self.objects and not self.objects[key].deleted
        if verb == "create":
            if there:
                raise KubernetesError(status=409, reason="AlreadyExists", message=f'{resource} "{name}" already exists')
            return aiohttp.web.json_response(self.put(kind, request.data), status=201)
        if not there:
            raise KubernetesError(status=404, reason="NotFound", message=f'{resource} "{name}" not found')
        one = copy.deepcopy(self.find(kind, name))
        if verb == "patch":
            assert request.headers["Content-Type"] == "application/json-patch+json"
            try:
                one = self.put(kind, jsonpatch.apply_patch(one, request.data))
            except (jsonpatch.JsonPatchException, kubernetes_validate.ValidationError):
                raise KubernetesError(
                    status=422,
                    reason="Invalid",
                    message="the server rejected our request due to an error in our request",
                ) from None
        return aiohttp.web.json_response(one)

    # The controllers, the scheduler and the kubelet.

    def settle(self) -> None:
        """Step until nothing changes any more."""
        while self.advance():
            pass

    def advance(self) -> bool:
        """One step; returns whether anything changed. As rolloutRecreate in Kubernetes' deployment controller."""
        deployment = copy.deepcopy(self.deployment)
        spec, status = deployment["spec"], deployment.setdefault("status", {})
        mine = next((one for one in self.all(REPLICASETS) if _template(one) == spec["template"]), None)
        label = mine["metadata"]["labels"][HASH] if mine else None
        current = [pod for pod in self.pods if pod["metadata"]["labels"][HASH] == label]
        counted = {
            "replicas": len(self.pods),
            "updatedReplicas": len(current),
            "readyReplicas": sum(_is_ready(pod) for pod in self.pods),
        }
        if status.get("observedGeneration") != deployment["metadata"]["generation"]:
            self._status(deployment, observedGeneration=deployment["metadata"]["generation"], **counted)
            return True
        kept = current if spec["replicas"] else []
        for pod in [pod for pod in self.pods if pod not in kept]:
            if "deletionTimestamp" in pod["metadata"]:
                del self.objects[PODS, NAMESPACE, pod["metadata"]["name"]]
            else:
                pod = copy.deepcopy(pod)
                pod["metadata"] |= {"deletionTimestamp": self.now(), "deletionGracePeriodSeconds": 90}
                self.put(PODS, pod)
            return True
        if mine is None and spec["replicas"]:
            self._replicaset(spec)
            self._status(deployment, conditions=[self._progressing("NewReplicaSetCreated", "True")], **counted)
            return True
        if spec["replicas"] and not current and self.mode != "quota":
            assert mine is not None
            self.put(PODS, self._pod(mine))
            return True
        if current and "conditions" not in current[0]["status"]:
            pod = copy.deepcopy(current[0])
            pod["status"] |= getattr(self, f"pod_{self.mode}")(pod)
            self.put(PODS, pod)
            return True
        if any(status.get(name) != count for name, count in counted.items()):
            self._status(deployment, **counted)
            return True
        return False

    def pass_the_deadline(self) -> None:
        """Let progressDeadlineSeconds pass."""
        late = self._progressing("ProgressDeadlineExceeded", "False")
        self._status(copy.deepcopy(self.deployment), conditions=[late])

    def _status(self, deployment: Object, **values: Any) -> None:
        deployment.setdefault("status", {}).update(values)
        self.put(DEPLOYMENTS, deployment)

    def _progressing(self, reason: str, status: str) -> Object:
        return {"type": "Progressing", "status": status, "reason": reason, "lastUpdateTime": self.now()}

    def _replicaset(self, spec: Object) -> None:
        label = f"{next(self.versions):x}"
        template = copy.deepcopy(spec["template"])
        template["metadata"]["labels"][HASH] = label
        selector = {"matchLabels": {**spec["selector"]["matchLabels"], HASH: label}}
        conditions = []
        if self.mode == "quota":
            message = "pods is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=2, limited to 0"
            conditions = [{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}]
        self.put(
            REPLICASETS,
            {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "metadata": {"name": f"vllm-{label}", "labels": dict(selector["matchLabels"])},
                "spec": {"replicas": 1, "selector": selector, "template": template},
                "status": {"replicas": 0, "conditions": conditions},
            },
        )

    def _pod(self, replicaset: Object) -> Object:
        template = copy.deepcopy(replicaset["spec"]["template"])
        template["metadata"]["name"] = f"{replicaset['metadata']['name']}-{next(self.versions):x}"
        return {"apiVersion": "v1", "kind": "Pod", **template, "status": {"phase": "Pending"}}

    def pod_ready(self, pod: Object) -> Object:
        """It is ready."""
        running = _container(pod, {"running": {"startedAt": self.now()}}, ready=True)
        return {"phase": "Running", "conditions": [_is("Ready", "True")], "containerStatuses": [running]}

    def pod_silent(self, pod: Object) -> Object:
        """It runs, and is never ready."""
        running = _container(pod, {"running": {"startedAt": self.now()}})
        unready = _is("Ready", "False", "ContainersNotReady", "containers with unready status: [vllm]")
        return {"phase": "Running", "conditions": [unready], "containerStatuses": [running]}

    def pod_crashing(self, pod: Object) -> Object:
        """It crashes at startup, and Kubernetes backs off."""
        state = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}}
        crashed = _container(pod, state, lastState={"terminated": {"exitCode": 1, "reason": "Error"}}, restartCount=3)
        return {"phase": "Running", "conditions": [_is("Ready", "False")], "containerStatuses": [crashed]}

    def pod_killed(self, pod: Object) -> Object:
        """It exceeds its memory limit again and again."""
        crashed = _container(pod, {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, restartCount=2)
        return {"phase": "Running", "conditions": [_is("Ready", "False")], "containerStatuses": [crashed]}

    def pod_ended_once(self, pod: Object) -> Object:
        """It has crashed for the first time."""
        ended = _container(pod, {"terminated": {"exitCode": 1, "reason": "Error"}})
        return {"phase": "Running", "conditions": [_is("Ready", "False")], "containerStatuses": [ended]}

    def pod_without_image(self, pod: Object) -> Object:
        """Its image does not exist."""
        message = 'Back-off pulling image "vllm/vllm-openai:v0.32.0": not found'
        waiting = _container(pod, {"waiting": {"reason": "ImagePullBackOff", "message": message}})
        return {"phase": "Pending", "conditions": [_is("Ready", "False")], "containerStatuses": [waiting]}

    def pod_without_middleware(self, pod: Object) -> Object:
        """The image of its init container does not exist."""
        image = pod["spec"]["initContainers"][0]["image"]
        waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such host"}}
        first = _container(pod, waiting) | {"name": "middleware", "image": image}
        return {"phase": "Pending", "conditions": [_is("Ready", "False")], "initContainerStatuses": [first]}

    def pod_without_a_node(self, pod: Object) -> Object:
        """No node has two free GPUs."""
        message = "0/8 nodes are available: 1 Insufficient nvidia.com/gpu, 7 node(s) didn't match Pod's node selector."
        return {"phase": "Pending", "conditions": [_is("PodScheduled", "False", "Unschedulable", message)]}


def LOST(_: Any) -> None:
    """A fault: the request is handled, and the response lost."""


def _template(replicaset: Object) -> Object:
    template = copy.deepcopy(replicaset["spec"]["template"])
    del template["metadata"]["labels"][HASH]
    return dict(template)


def _is(kind: str, status: str, reason: str = "", message: str = "") -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def _is_ready(pod: Object) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))


def _container(pod: Object, state: Object, ready: bool = False, **more: Any) -> Object:
    image = pod["spec"]["containers"][0]["image"]
    return {
        "name": "vllm",
        "image": image,
        "imageID": "",
        "ready": ready,
        "restartCount": 0,
        "state": state,
    } | more


class Running:
    """A fake API server on a port. It can be stopped, and started again on the same port."""

    def __init__(self, fake: FakeCluster) -> None:
        self.fake = fake
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._run(fake.__aenter__())
        self.port: int | None = None
        self.start()

    def start(self) -> None:
        """Accept connections."""
        self.server = Server(self.fake, port=self.port)
        self._run(self.server.__aenter__())
        self.port = self.server.port

    def stop(self) -> None:
        """Refuse connections."""
        self._run(self.server.__aexit__(None, None, None))

    def kubeconfig(self, path: Path, bearer: str = "none") -> Path:
        """Write a KUBECONFIG file for it."""
        named = {"name": "fake"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{**named, "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{**named, "user": {"token": bearer}}],
            "contexts": [{**named, "context": {"cluster": "fake", "user": "fake"}}],
        }
        path.write_text(json.dumps(config))
        return path

    def close(self) -> None:
        """Stop it for good."""
        with contextlib.suppress(RuntimeError, AssertionError, ValueError):
            self.stop()
        self._run(self.fake.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(30)


def wanted(base: Served, generation: int = 1) -> Desired:
    """A document whose desired state is this base."""
    return Desired(generation=generation, serving=Serving(base=base, names={base.name: base.versioned}))


def write_package(folder: Path) -> str:
    """Write the part of a package that vLLM's options depend on; returns its directory."""
    (folder / "package").mkdir()
    (folder / "package" / "config.json").write_text('{"dtype": "bfloat16"}')
    return str(folder / "package")


@dataclass
class Place:
    """A cluster with the Deployment and a package on its node. `running` is the fake, if it is one."""

    cluster: Cluster
    namespace: str
    package: str
    another_writer: Callable[[], object]  # changes the Deployment
    running: Running | None = None

    @property
    def document(self) -> ConfigMapDocument:
        """The document on the cluster."""
        return ConfigMapDocument(self.cluster, self.namespace, DOCUMENT)

    @property
    def server(self) -> KubernetesServer:
        """vLLM on the cluster."""
        return KubernetesServer(self.cluster, self.namespace, "vllm", "http://vllm:8000")

    @property
    def fake(self) -> FakeCluster:
        """The fake's controllers."""
        assert self.running is not None
        return self.running.fake

    @property
    def deployment(self) -> dict[str, Any]:
        """The Deployment, read through the API."""
        found = self.cluster.get("deployments", self.namespace, "vllm")
        assert found is not None
        return found

    def ensure(self, base: Served = NEW, engine: Engine = ENGINE) -> str:
        """One step of the reconciler."""
        return self.server.ensure(base, self.package, engine)

    def serve(self, base: Served = NEW, mode: str = "ready") -> list[str]:
        """Alternate with the controllers until it serves; returns what it waited for."""
        self.fake.mode = mode
        waited = []
        for _ in range(20):
            waiting = self.ensure(base)
            if not waiting:
                return waited
            waited += [waiting] if waiting not in waited else []
            self.fake.advance()
        raise AssertionError(waited)

    def fail(self, mode: str, base: Served = NEW) -> str:
        """Alternate with the controllers until it fails; returns the reason."""
        with pytest.raises(Failed) as failed:
            self.serve(base, mode)
        return str(failed.value)


@contextlib.contextmanager
def fake_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A fake cluster that KUBECONFIG points to; nothing serves yet."""
    server = Running(FakeCluster())
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(folder / "kubeconfig")))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    def change() -> None:
        server.fake.edit(lambda one: one["metadata"].setdefault("annotations", {}).update(someone="else"))

    try:
        yield Place(open_cluster(patience=30, first_wait=0.001), NAMESPACE, write_package(folder), change, server)
    finally:
        server.close()
