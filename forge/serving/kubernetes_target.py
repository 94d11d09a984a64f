"""Serving on the cluster: the document is a ConfigMap, and vLLM a Deployment that the reconciler patches.

Changes by other writers are never overwritten: each of our changes is a JSON Patch (RFC 6902) that tests the
resourceVersion (https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions). If the response to a
patch is lost, it is sent again, and then fails its test; so a patch that is refused may have been applied. vllm_pods.py
explains why a pod isn't ready. The manifests are in infra/apps/ml-inference/vllm/.
"""

import json
import os
import time
from typing import TYPE_CHECKING, Any

from forge.core.contracts import Engine
from forge.core.errors import ForgeError
from forge.serving.desired import Conflict, Desired, Failed, Served, read_document
from forge.serving.engine import arguments
from forge.serving.vllm_pods import SERVES, waiting_for

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, ApiException

MANIFESTS = "infra/apps/ml-inference/vllm"
KEY = "desired.json"
PREVIOUS = "forge/previous"  # the Deployment's annotation with its previous base and arguments, for operators
CONTAINER = "vllm"
LISTEN = ["--host", "0.0.0.0", "--port", "8000"]  # noqa: S104 - in a pod, behind a Service
LOG_LINES = 12

TIMEOUT = (5.0, 15.0)  # seconds to connect, and to wait for data
TRANSIENT = (429, 500, 502, 503, 504)  # returned by an API server that is overloaded or starting
FIRST_WAIT, LONGEST_WAIT = 0.5, 5.0  # seconds between retries
# All calls to the API, and so all rights that infra/apps/ml-inference/vllm/rbac.yaml has to grant.
CALLS = {
    ("get", "configmaps"): ("CoreV1Api", "read_namespaced_config_map"),
    ("create", "configmaps"): ("CoreV1Api", "create_namespaced_config_map"),
    ("patch", "configmaps"): ("CoreV1Api", "patch_namespaced_config_map"),
    ("get", "deployments"): ("AppsV1Api", "read_namespaced_deployment"),
    ("patch", "deployments"): ("AppsV1Api", "patch_namespaced_deployment"),
    ("list", "replicasets"): ("AppsV1Api", "list_namespaced_replica_set"),
    ("list", "pods"): ("CoreV1Api", "list_namespaced_pod"),
    ("get", "pods/log"): ("CoreV1Api", "read_namespaced_pod_log"),
}


class Unreachable(ForgeError):
    """The API server does not answer, or returns one of the TRANSIENT errors."""


class Refused(ForgeError):
    """The API server refuses a request, with this HTTP status."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", status: int = 0) -> None:
        self.status = status
        super().__init__(what, where=where, fix=fix)


class Cluster:
    """The API server. Requests have timeouts, and transient failures are retried for `patience` seconds.

    Responses are parsed as plain JSON, since the client's classes reject fields of later releases of Kubernetes.
    """

    def __init__(self, api: "ApiClient", patience: float, first_wait: float = FIRST_WAIT) -> None:
        self.api, self.patience, self.first_wait = api, patience, first_wait

    def get(self, resource: str, namespace: str, name: str) -> dict[str, Any] | None:
        """An object; None if it doesn't exist."""
        try:
            return dict(json.loads(self.ask("get", resource, namespace, name)))
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def patch(self, resource: str, namespace: str, name: str, *operations: dict[str, Any]) -> dict[str, Any]:
        """Apply a JSON Patch; returns the new object. Raises Refused with 409 or 422 if a `test` operation fails."""
        return dict(json.loads(self.ask("patch", resource, namespace, name, body=list(operations))))

    def find(self, resource: str, namespace: str, labels: dict[str, str]) -> list[dict[str, Any]]:
        """The objects with these labels."""
        selector = ",".join(f"{name}={value}" for name, value in labels.items())
        return list(json.loads(self.ask("list", resource, namespace, label_selector=selector))["items"])

    def ask(self, verb: str, resource: str, namespace: str, name: str = "", **more: Any) -> bytes:
        """The response body of one of CALLS. Raises Unreachable, or Refused with the server's reason."""
        from kubernetes import client
        from kubernetes.client import ApiException
        from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential
        from urllib3.exceptions import HTTPError

        where = f"{resource}{f' {name}' if name else ''} in namespace {namespace}"
        group, method = CALLS[verb, resource]
        call = getattr(getattr(client, group)(self.api), method)
        target = [name, namespace] if name else [namespace]
        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_after_delay(self.patience),
            wait=wait_exponential(self.first_wait, max=LONGEST_WAIT),
            reraise=True,
        )

        def once() -> bytes:
            return bytes(call(*target, **more, _preload_content=False, _request_timeout=TIMEOUT).data)

        try:
            return retrying(once)
        except (ApiException, HTTPError) as error:
            if isinstance(error, ApiException) and not _is_transient(error):
                raise self._refused(error, verb, resource, where) from None
            status = getattr(error, "status", 0)
            how = f"answers {status}" if status else "does not answer"
            raise Unreachable(
                f"{self._server} {how} to {verb} {where} ({_reason(error)})", fix="it may be starting"
            ) from None

    @property
    def _server(self) -> str:
        return f"the API server {self.api.configuration.host}"

    def _refused(self, error: "ApiException", verb: str, resource: str, where: str) -> ForgeError:
        reason = _reason(error)
        if error.status == 0:  # TLS
            return Refused(reason, where=self._server, fix="fix the certificate in KUBECONFIG")
        if error.status == 401:
            return Refused(
                "rejects the credentials (401)", where=self._server, fix="renew those in KUBECONFIG", status=401
            )
        if error.status == 403:
            role = "forge-rollout (the reconciler: vllm-reconciler)" if resource == "configmaps" else "vllm-reconciler"
            return Refused(
                f"not allowed to {verb} {where} ({reason})",
                fix=f"bind the Role {role} of {MANIFESTS}/rbac.yaml to this process's ServiceAccount",
                status=403,
            )
        answer = f"answers {error.status} to {verb} {where} ({reason})"
        return Refused(answer, where=self._server, status=error.status or 0)


def open_cluster(patience: float = 45.0, first_wait: float = FIRST_WAIT) -> Cluster:
    """The cluster that this process's pod is in, otherwise that of KUBECONFIG; ForgeError if there is neither.

    With the default patience, a rollout survives a restart of the API server. The reconciler repeats its steps anyway.
    """
    import yaml
    from kubernetes import client, config

    settings = client.Configuration()
    settings.retries = False  # not urllib3's retries as well as tenacity's
    file = os.environ.get("KUBECONFIG", "")
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        elif file:
            config.load_kube_config(file, client_configuration=settings)
        else:
            raise ForgeError(
                "the cluster cannot be reached: this is not a pod, and KUBECONFIG is not set",
                fix="set KUBECONFIG to a file that gives access to the cluster, or unset FORGE_SERVING_TARGET to serve "
                "on this machine",
            )
    except (config.ConfigException, yaml.YAMLError) as error:
        place = file if "KUBERNETES_SERVICE_HOST" not in os.environ else "the pod's ServiceAccount"
        raise ForgeError(f"gives no access to a cluster ({_line(str(error))})", where=place, fix="fix it") from None
    return Cluster(client.ApiClient(settings), patience, first_wait)


class ConfigMapDocument:
    """The document as a ConfigMap. Its revision is the resourceVersion, "" if there is no ConfigMap yet."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name
        self.where = f"ConfigMap {name} in namespace {namespace}"

    def read(self) -> tuple[Desired, str]:
        """See forge.serving.desired.DesiredStore."""
        found = self.cluster.get("configmaps", self.namespace, self.name)
        if found is None:
            return Desired(), ""
        text = (found.get("data") or {}).get(KEY, "")
        return read_document(text, self.where), found["metadata"]["resourceVersion"]

    def write(self, desired: Desired, revision: str) -> None:
        """See forge.serving.desired.DesiredStore. A write that succeeded but lost its response is not a Conflict."""
        data = {KEY: desired.model_dump_json(indent=2) + "\n"}
        try:
            if revision:
                change = {"op": "add", "path": "/data", "value": data}
                self.cluster.patch("configmaps", self.namespace, self.name, _unchanged(revision), change)
            else:
                metadata = {"name": self.name, "labels": {"app.kubernetes.io/managed-by": "forge"}}
                body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
                self.cluster.ask("create", "configmaps", self.namespace, body=body)
        except Refused as error:
            if error.status not in (404, 409, 422):
                raise
            current, current_revision = self.read()
            if current == desired:
                return
            if error.status == 409 or current_revision != revision:
                raise Conflict from None
            raise

    def wait(self, seconds: float) -> None:
        """See forge.serving.desired.DesiredStore. Always sleeps the whole time, to spare the API server."""
        time.sleep(seconds)


class KubernetesServer:
    """vLLM as a Deployment of one pod. The reconciler sets its arguments and replicas; the rest comes from git."""

    def __init__(self, cluster: Cluster, namespace: str, deployment: str, url: str) -> None:
        self.cluster, self.namespace, self.name, self.url = cluster, namespace, deployment, url
        self.where = f"Deployment {deployment} in namespace {namespace}"

    def ensure(self, base: Served, path: str, engine: Engine) -> str:
        """See forge.serving.desired.Server. If the API server can't be reached, that is what it waits for."""
        try:
            return self._ensure(base.versioned, [*LISTEN, *arguments(base, path, engine)])
        except Unreachable as error:
            return error.message
        except Refused as error:
            raise Failed(error.message) from None

    def stop(self) -> None:
        """See forge.serving.desired.Server."""
        found = self.cluster.get("deployments", self.namespace, self.name)
        if found is not None and found["spec"].get("replicas") != 0:
            scaled = {"op": "add", "path": "/spec/replicas", "value": 0}
            self.cluster.patch("deployments", self.namespace, self.name, scaled)

    def _ensure(self, versioned: str, args: list[str]) -> str:
        found = self.cluster.get("deployments", self.namespace, self.name)
        if found is None:
            raise Failed(f"{self.where}: does not exist; create it: kubectl apply -k {MANIFESTS}")
        changes = self._changes(found, versioned, args)
        if not changes:
            return self._progress(found)
        revision = found["metadata"]["resourceVersion"]
        try:
            found = self.cluster.patch("deployments", self.namespace, self.name, _unchanged(revision), *changes)
        except Refused as error:
            if error.status not in (404, 409, 422):
                raise
            current = self.cluster.get("deployments", self.namespace, self.name)
            if error.status == 422 and current and current["metadata"]["resourceVersion"] == revision:
                raise Failed(f"{self.where}: the change is not valid; {error.message}") from None
            return f"the Deployment {self.name} was changed by another writer; it is read again"
        return self._progress(found)

    def _changes(self, found: dict[str, Any], versioned: str, args: list[str]) -> list[dict[str, Any]]:
        """The patch operations that make the Deployment serve a base; none if it does."""
        template = found["spec"]["template"]
        containers = template["spec"]["containers"]
        index = next((at for at, one in enumerate(containers) if one["name"] == CONTAINER), None)
        if index is None:
            raise Failed(f"{self.where}: has no container {CONTAINER}; apply {MANIFESTS} again")
        annotations = template["metadata"].get("annotations") or {}
        previous = {"serves": annotations.get(SERVES, ""), "args": containers[index].get("args") or []}
        changes: list[dict[str, Any]] = []
        if previous != {"serves": versioned, "args": args}:
            # The whole map, since no key can be added to a missing map. The test of the revision protects other keys.
            at = "/spec/template/metadata/annotations"
            changes += [
                {"op": "add", "path": f"/spec/template/spec/containers/{index}/args", "value": args},
                {"op": "add", "path": at, "value": annotations | {SERVES: versioned}},
            ]
            if previous["serves"]:
                kept = (found["metadata"].get("annotations") or {}) | {PREVIOUS: json.dumps(previous)}
                changes.append({"op": "add", "path": "/metadata/annotations", "value": kept})
        if changes or found["spec"].get("replicas") != 1:
            changes.append({"op": "add", "path": "/spec/replicas", "value": 1})
        return changes

    def _progress(self, found: dict[str, Any]) -> str:
        """What the Deployment waits for, "" if it is complete. Raises Failed if it can't become complete."""
        status = found.get("status") or {}
        if status.get("observedGeneration", 0) < found["metadata"]["generation"]:
            return f"the controller to notice the change of the Deployment {self.name}"
        if all(status.get(count) == 1 for count in ("updatedReplicas", "replicas", "readyReplicas")):
            return ""
        labels = found["spec"]["selector"]["matchLabels"]
        sets = self.cluster.find("replicasets", self.namespace, labels)
        pods = self.cluster.find("pods", self.namespace, labels)
        return waiting_for(self.where, found, sets, pods, self._log)

    def _log(self, pod: str, container: str, previous: bool) -> str:
        """The end of a container's log, or of its previous container's; "" if it can't be read."""
        try:
            more = {"container": container, "previous": previous, "tail_lines": LOG_LINES}
            return self.cluster.ask("get", "pods/log", self.namespace, pod, **more).decode(errors="replace")
        except Refused:
            return ""


def _unchanged(revision: str) -> dict[str, Any]:
    return {"op": "test", "path": "/metadata/resourceVersion", "value": revision}


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may help: the connection failed, or the server is overloaded or starting."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, ApiException):
        cut = not error.status and "CERTIFICATE_VERIFY_FAILED" not in str(error.reason)  # during the TLS handshake
        return cut or error.status in TRANSIENT
    return isinstance(error, HTTPError)


def _reason(error: Exception) -> str:
    """The message of the API server's Status object, or of a connection error."""
    try:
        return str(json.loads(getattr(error, "body", ""))["message"])
    except (ValueError, KeyError, TypeError):
        return _line(str(getattr(error, "reason", "") or error))


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
