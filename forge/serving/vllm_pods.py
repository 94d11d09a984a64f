"""What the pods of a Deployment say of why it is not ready: for a person who can fix it.

Only pods of the Deployment's template as it is now count. Those of the one before may still be there, failing, and the
Deployment's own conditions may still be about them: its controller does one thing after the other.
"""

from collections.abc import Callable
from typing import Any

from forge.serving.desired import Failed

SERVES = "forge/serves"  # the pod template's annotation with the versioned name of the base
PULL = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
CREATE = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
HASH = "pod-template-hash"  # the label that a ReplicaSet and its pods share
RESTARTS = 2  # after which a container that has ended is not waited for

Log = Callable[[str, str, bool], str]  # (pod, container, whether the one before) -> the end of its log
Object = dict[str, Any]


def waiting_for(where: str, deployment: Object, sets: list[Object], pods: list[Object], log: Log) -> str:
    """What a Deployment waits for that is not complete. Raises Failed where waiting will not help.

    `sets` and `pods` are those that its selector finds; `log` reads the end of a log.
    """
    mine = next((one for one in sets if _template(one) == _template(deployment)), None)
    label = mine["metadata"]["labels"][HASH] if mine else None
    current = [one for one in pods if label is not None and one["metadata"]["labels"].get(HASH) == label]
    ending = [one["metadata"]["name"] for one in pods if one not in current or _is_ending(one)]
    current = [one for one in current if not _is_ending(one)]
    refused = _condition(mine or {}, "ReplicaFailure", "True")
    if refused and not current:
        raise Failed(
            f"{where}: its pod is not admitted ({refused.get('message', '')}); raise the namespace's quota, or fix "
            "the pod template"
        )
    if not current:
        return f"pod {', '.join(sorted(ending))} to end" if ending else f"a pod of {where} to be made"
    pod = max(current, key=lambda one: str(one["metadata"]["creationTimestamp"]))
    waiting = _pod(where, pod, log)
    late = _condition(deployment, "Progressing")
    # The condition stays as it is when the Deployment starts a pod anew, and is then about the pod before.
    if late.get("reason") == "ProgressDeadlineExceeded" and late.get("lastUpdateTime", "") > _created(pod):
        name, seconds = pod["metadata"]["name"], deployment["spec"].get("progressDeadlineSeconds")
        unready = _condition(pod, "Ready", "False").get("message", "")
        raise Failed(
            f"{where}: not ready within {seconds} s: {waiting}{f' ({unready})' if unready else ''}; see kubectl "
            f"describe pod {name}, or raise progressDeadlineSeconds{_quoted(_last_log(pod, log))}"
        )
    return waiting


def _pod(where: str, pod: Object, log: Log) -> str:
    """What one pod waits for; raises Failed where it will not come to it."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    scheduled = _condition(pod, "PodScheduled", "False")
    if scheduled.get("reason") == "Unschedulable":
        message = scheduled.get("message", "")
        fix = "give the node the labels, and the pod the requests, that the other needs"
        if "nvidia.com/gpu" in message:
            fix = "something else holds the GPUs that it needs: find it with kubectl get pods -A -o wide, and end it"
        raise Failed(f"{where}: no node takes pod {name} ({message}); {fix}")
    doing = []
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        doing.append(_container(where, name, container, log))
    return f"pod {name}: {'; '.join(filter(None, doing)) or status.get('phase', 'Pending')}"


def _container(where: str, pod: str, container: Object, log: Log) -> str:
    """What one container does that is not ready, or ""; raises Failed where it will not be."""
    state, its = container.get("state") or {}, f"container {container['name']} of pod {pod}"
    waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in PULL:
        raise Failed(
            f"{where}: the image {container['image']} of {its} cannot be pulled ({reason}: {message}); fix the "
            "image's name, or the node's access to its registry"
        )
    if reason in CREATE:
        raise Failed(f"{where}: {its} cannot be started ({reason}: {message}); fix the pod template")
    restarts = container.get("restartCount", 0)
    done = container.get("ready", False)  # also of an init container that has ended well
    if reason == "CrashLoopBackOff" or (ended and not done and restarts >= RESTARTS):
        last = ended or (container.get("lastState") or {}).get("terminated") or {}
        raise Failed(_crash(where, its, last, restarts, log(pod, container["name"], not ended)))
    if done:
        return ""
    if ended:
        return f"{container['name']} ended with exit code {ended.get('exitCode')}, and is started again"
    return f"{container['name']} {f'waits ({reason})' if reason else 'to be ready'}"


def _crash(where: str, its: str, last: Object, restarts: int, log: str) -> str:
    code, reason = last.get("exitCode", "unknown"), last.get("reason", "")
    oom = reason == "OOMKilled"
    fix = "it was killed for its memory: raise resources.limits.memory" if oom else "its log says why"
    told = _quoted(log) or "\n(its log cannot be read here; see kubectl logs --previous)"
    return f"{where}: {its} ends again and again ({restarts} restarts; last exit code {code} {reason}); {fix}{told}"


def _last_log(pod: Object, log: Log) -> str:
    """The end of the log of the container that is running, and not ready."""
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        if (container.get("state") or {}).get("running") and not container.get("ready"):
            return log(pod["metadata"]["name"], container["name"], False)
    return ""


def _template(one: Object) -> Object:
    """A pod template, but for the label that the Deployment's controller puts into a ReplicaSet's."""
    template = one["spec"]["template"]
    labels = {name: value for name, value in template["metadata"]["labels"].items() if name != HASH}
    metadata = {name: value for name, value in template["metadata"].items() if value is not None}
    return {**template, "metadata": {**metadata, "labels": labels}}


def _condition(one: Object, kind: str, status: str = "") -> Object:
    """A condition of an object's status, empty where there is none (or it is not in `status`)."""
    for condition in (one.get("status") or {}).get("conditions") or []:
        if condition["type"] == kind and status in ("", condition["status"]):
            return dict(condition)
    return {}


def _is_ending(pod: Object) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _created(pod: Object) -> str:
    return str(pod["metadata"]["creationTimestamp"])


def _quoted(log: str) -> str:
    return "".join(f"\n  {line[:300]}" for line in log.splitlines() if line.strip())
