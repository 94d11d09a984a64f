"""Explains why a Deployment isn't ready, from its pods, for a person who can fix it.

Only pods of the current template count. Pods of the previous one may still exist and fail, and the Deployment's own
conditions may still describe those, since its controller works step by step.
"""

from collections.abc import Callable
from typing import Any

from forge.serving.desired import Failed

SERVES = "forge/serves"  # the pod template's annotation with the versioned name of the base
PULL = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
CREATE = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
HASH = "pod-template-hash"  # the label that a ReplicaSet and its pods share
RESTARTS = 2  # after this many restarts, an exited container counts as failed

Log = Callable[[str, str, bool], str]  # (pod, container, previous) -> the end of the log
Object = dict[str, Any]


def waiting_for(where: str, deployment: Object, sets: list[Object], pods: list[Object], log: Log) -> str:
    """What an incomplete Deployment waits for. Raises Failed if waiting won't help.

    `sets` and `pods` are the ReplicaSets and pods that its selector matches; `log` reads the end of a log.
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
        return f"pod {', '.join(sorted(ending))} to terminate" if ending else f"a pod of {where} to be created"
    pod = max(current, key=lambda one: str(one["metadata"]["creationTimestamp"]))
    waiting = _pod(where, pod, log)
    late = _condition(deployment, "Progressing")
    # The condition isn't reset when a new pod is created, and may then be about the previous pod.
    if late.get("reason") == "ProgressDeadlineExceeded" and late.get("lastUpdateTime", "") > _created(pod):
        name, seconds = pod["metadata"]["name"], deployment["spec"].get("progressDeadlineSeconds")
        unready = _condition(pod, "Ready", "False").get("message", "")
        raise Failed(
            f"{where}: not ready within {seconds} s: {waiting}{f' ({unready})' if unready else ''}; see kubectl "
            f"describe pod {name}, or raise progressDeadlineSeconds{_quoted(_last_log(pod, log))}"
        )
    return waiting


def _pod(where: str, pod: Object, log: Log) -> str:
    """What a pod waits for. Raises Failed if it will never get it."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    scheduled = _condition(pod, "PodScheduled", "False")
    if scheduled.get("reason") == "Unschedulable":
        message = scheduled.get("message", "")
        fix = "make the node's labels and resources and the pod's selector and requests match"
        if "nvidia.com/gpu" in message:
            fix = "other pods hold the GPUs that it needs: find them with kubectl get pods -A -o wide, and stop them"
        raise Failed(f"{where}: pod {name} fits no node ({message}); {fix}")
    doing = []
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        doing.append(_container(where, name, container, log))
    return f"pod {name}: {'; '.join(filter(None, doing)) or status.get('phase', 'Pending')}"


def _container(where: str, pod: str, container: Object, log: Log) -> str:
    """What a container waits for; "" if it is ready. Raises Failed if it never will be."""
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
    done = container.get("ready", False)  # also true of an init container that has succeeded
    if reason == "CrashLoopBackOff" or (ended and not done and restarts >= RESTARTS):
        last = ended or (container.get("lastState") or {}).get("terminated") or {}
        raise Failed(_crash(where, its, last, restarts, log(pod, container["name"], not ended)))
    if done:
        return ""
    if ended:
        return f"{container['name']} exited with code {ended.get('exitCode')} and is restarted"
    return f"{container['name']} {f'waits ({reason})' if reason else 'to be ready'}"


def _crash(where: str, its: str, last: Object, restarts: int, log: str) -> str:
    code, reason = last.get("exitCode", "unknown"), last.get("reason", "")
    oom = reason == "OOMKilled"
    fix = "it ran out of memory: raise resources.limits.memory" if oom else "its log says why"
    lines = _quoted(log) or "\n(its log cannot be read here; see kubectl logs --previous)"
    return f"{where}: {its} keeps crashing ({restarts} restarts; last exit code {code} {reason}); {fix}{lines}"


def _last_log(pod: Object, log: Log) -> str:
    """The end of the log of a container that is running but not ready."""
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        if (container.get("state") or {}).get("running") and not container.get("ready"):
            return log(pod["metadata"]["name"], container["name"], False)
    return ""


def _template(one: Object) -> Object:
    """A pod template without the label that the controller adds to a ReplicaSet's template."""
    template = one["spec"]["template"]
    labels = {name: value for name, value in template["metadata"]["labels"].items() if name != HASH}
    metadata = {name: value for name, value in template["metadata"].items() if value is not None}
    return {**template, "metadata": {**metadata, "labels": labels}}


def _condition(one: Object, kind: str, status: str = "") -> Object:
    """A condition of an object's status; empty if there is none, or it has another `status`."""
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
