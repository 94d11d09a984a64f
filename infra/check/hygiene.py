"""Required in every pod: limits, probes, a security context. Forbidden: :latest, passwords in git."""

import re
from collections.abc import Iterator
from typing import Any

from infra.check.tree import Object, Pod, Tree, at, name_of

GPU = "nvidia.com/gpu"
SERVICES = ("Deployment", "StatefulSet", "DaemonSet")  # long-running
PASSWORDS = re.compile(r"minioadmin|changeme|admin[:/]admin|postgres[:/]postgres|password[:=]\s*\w+123", re.I)
SECRET = re.compile(r"(password|passwd|secret_?key|access_?key|api_?key|token|credential)s?$", re.I)
REFERENCE = re.compile(r"(existing|name|ref|file|path|mount|from|keyof|password_length)", re.I)


def check_hygiene(tree: Tree) -> Iterator[str]:
    """What is missing or forbidden, except for what infra/exceptions.yaml allows."""
    used = set()
    for where, rule, what in _findings(tree):
        excepted = [
            n for n, one in enumerate(tree.lists["exceptions"]) if one["rule"] == rule and where.endswith(one["where"])
        ]
        used.update(excepted)
        if not excepted:
            yield f"{where}: {what}"
    ours = {"limits", "probes", "security", "account", "links"}
    for n, one in enumerate(tree.lists["exceptions"]):
        if one["rule"] in ours and n not in used:
            yield f"infra/exceptions.yaml: {one['where']} needs no exception from {one['rule']}"


def _findings(tree: Tree) -> Iterator[tuple[str, str, str]]:
    enforce = "pod-security.kubernetes.io/enforce"
    levels = {
        one["metadata"]["name"]: (one["metadata"].get("labels") or {}).get(enforce) for _, one in tree.of("Namespace")
    }
    for name, level in levels.items():
        if level not in ("restricted", "baseline", "privileged"):
            yield f"Namespace {name}", "level", f"has no Pod Security level ({enforce})"
    for pod in tree.pods:
        yield from _pod(pod)
        host = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(name)]
        host += ["hostPath" for volume in pod.spec.get("volumes") or [] if "hostPath" in volume]
        if host and levels.get(pod.namespace) != "privileged":
            yield (
                pod.where,
                "level",
                f"{host[0]} is not allowed in {pod.namespace}, whose level is {levels.get(pod.namespace)}",
            )
    for where, one in tree.objects:
        named = name_of(where, one)
        if one["kind"] == "Secret":
            yield (
                named,
                "secret",
                "is a Secret in git; encrypt it with SOPS in infra/secrets and list it in external.yaml",
            )
        for path, value in _leaves(one):
            if PASSWORDS.search(value):
                yield named, "password", f"{path} is a default credential"
        if one["kind"] == "HelmRelease":
            for path, value in _leaves(one["spec"].get("values") or {}):
                last = path.rpartition(".")[2]
                if SECRET.search(last) and not REFERENCE.search(last) and value not in ("", "None", "True", "False"):
                    yield named, "password", f"values.{path} is a credential in git; refer to a Secret"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _leaves(one, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for n, one in enumerate(value):
            yield from _leaves(one, f"{path}.{n}")
    else:
        yield path, str(value)


def _pod(pod: Pod) -> Iterator[tuple[str, str, str]]:
    spec, where = pod.spec, pod.where
    everything = [*spec.get("initContainers", []), *pod.containers]
    for container in everything:
        named = f"{where} {container['name']}"
        resources = container.get("resources") or {}
        for field in ("requests.cpu", "requests.memory", "limits.memory"):
            if at(resources, field) is None:
                yield named, "limits", f"resources.{field} is missing"
        if pod.chart:
            continue
        yield from _container(pod, container, named)
    if pod.chart:
        return
    for container in pod.containers if pod.kind in SERVICES else []:
        for probe in ("livenessProbe", "readinessProbe"):
            if probe not in container:
                yield f"{where} {container['name']}", "probes", f"has no {probe}"
    if spec.get("enableServiceLinks") is not False:
        yield where, "links", "enableServiceLinks is not false: Services set variables such as VLLM_PORT in pods"
    if spec.get("automountServiceAccountToken") is not False and "serviceAccountName" not in spec:
        yield where, "account", "automountServiceAccountToken is not false, but no serviceAccountName is set"
    if at(spec, "securityContext.seccompProfile.type") != "RuntimeDefault":
        yield where, "security", "securityContext.seccompProfile is not RuntimeDefault"
    yield from _gpus(pod)


def _container(pod: Pod, container: Object, named: str) -> Iterator[tuple[str, str, str]]:
    image = container.get("image", "")
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    if not tag or tag in ("latest", "main", "master", "nightly"):
        yield named, "image", f"image {image} has no version tag"
    secure = container.get("securityContext") or {}
    if secure.get("allowPrivilegeEscalation") is not False:
        yield named, "security", "securityContext.allowPrivilegeEscalation is not false"
    if at(secure, "capabilities.drop") != ["ALL"]:
        yield named, "security", "securityContext.capabilities does not drop ALL"
    root = secure.get("runAsNonRoot", at(pod.spec, "securityContext.runAsNonRoot")) is not True
    if root or secure.get("runAsUser", at(pod.spec, "securityContext.runAsUser")) in (0, None):
        yield named, "security", "may run as root: set runAsNonRoot and runAsUser"
    for variable in container.get("env") or []:
        name, value = variable["name"], variable.get("value")
        if name == "CUDA_VISIBLE_DEVICES":
            yield named, "gpu", "sets CUDA_VISIBLE_DEVICES, which the device plugin sets"
        if value and SECRET.search(name) and not REFERENCE.search(name):
            yield named, "password", f"{name} is a credential in git; take it from a Secret"


def _gpus(pod: Pod) -> Iterator[tuple[str, str, str]]:
    """What a pod with GPUs needs."""
    where, spec = pod.where, pod.spec
    counts = [int((at(one, "resources.limits") or {}).get(GPU, 0)) for one in pod.containers]
    if not any(counts):
        return
    for one, count in zip(pod.containers, counts, strict=True):
        requested = (one["resources"].get("requests") or {}).get(GPU)
        if count and requested is not None and int(requested) != count:
            yield where, "gpu", f"requests {requested} GPUs but is limited to {count}; the two must be equal"
    if spec.get("runtimeClassName") != "nvidia":
        yield where, "gpu", "has GPUs, but runtimeClassName is not nvidia"
    if not str(spec.get("priorityClassName", "")).startswith("forge-"):
        yield where, "gpu", "has GPUs, but no forge- priorityClassName"
    if (spec.get("nodeSelector") or {}).get("gpu-type") != "nvidia":
        yield where, "gpu", "has GPUs, but does not select GPU nodes (gpu-type: nvidia)"
    memory = any(at(one, "emptyDir.medium") == "Memory" for one in spec.get("volumes") or [])
    if max(counts) > 1 and not memory:
        yield where, "gpu", "has several GPUs, whose processes need /dev/shm: add an emptyDir with medium Memory"
