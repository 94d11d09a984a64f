"""One pod: a process that has its image's files, the environment that its template gives, and an empty disk."""

import functools
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from flyteidl.core.tasks_pb2 import TaskTemplate
from google.protobuf.json_format import MessageToDict
from minio import Minio

from tests.apart.images import HOME, TMP, Image
from tests.apart.manifests import Manifests, Object

LONGEST = 600  # seconds that a pod may take, whatever its task may
GPU = "nvidia.com/gpu"
HOST = re.compile(r"\b(https?)://([a-z0-9-]+)\.([a-z0-9-]+)(?:\.svc(?:\.cluster\.local)?)?(:\d+)?(?![\w.-])")
UNITS = {"": 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9}


class Services(Protocol):
    """What pods reach, and by whose leave."""

    urls: dict[str, str]  # of the cluster's services, and where they are here
    secrets: dict[str, dict[str, str]]  # by namespace/name

    def s3(self, user: str) -> Minio:
        """The S3 server, as a user of it."""

    def kubeconfig(self, namespace: str, account: str) -> Path:
        """How a service account reaches the API server."""


class NoPod(Exception):
    """The API server or the kubelet makes no such pod, and says why."""


@dataclass(frozen=True)
class Interrupt:
    """A signal for a pod's process, once its log has a text: SIGTERM as a drain sends it, SIGKILL for the whole pod."""

    text: str
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a pod ended: the exit code (negative: by that signal), its log, and what else went wrong."""

    code: int
    log: str
    error: str = ""


@dataclass(frozen=True)
class Objects(Manifests):
    """A project's objects, with the values that the services know for the keys of its Secrets."""

    values: dict[str, dict[str, str]] = field(default_factory=dict)

    @functools.cached_property
    def secrets(self) -> dict[str, dict[str, str]]:
        """What the project's Secrets hold."""
        known = super().secrets
        return {name: {key: self.values[name][key] for key in keys if key in self.values.get(name, {})}
                for name, keys in known.items()}  # fmt: skip


class Pods:
    """The pods of a project's tasks. `gpus`: whether they look for the GPUs that they asked for; here are none."""

    def __init__(self, project: Path, services: Services, folder: Path, *, gpus: bool = False) -> None:
        self.project, self.services, self.folder, self.gpus = project, services, folder, gpus
        self.objects = Objects(project, services.secrets)
        values = self.objects.find("HelmRelease", "ml-platform", "flyte")["spec"]["values"]
        self.plugin: Object = values["configuration"]["inline"]["plugins"]["k8s"]
        self.namespaces = {one.name for one in (project / "infra" / "apps").iterdir()}
        self.images: dict[str, Image] = {}

    def run(
        self,
        name: str,
        namespace: str,
        task: TaskTemplate,
        args: dict[str, str],
        env: dict[str, str],
        *,
        prefix: list[str] | None = None,
        seconds: float = LONGEST,
        interrupt: Interrupt | None = None,
    ) -> Ended:
        """Start a task's pod, wait for its end and leave nothing running; NoPod where it can't be made.

        `args` are what the placeholders of its command stand for, `prefix` is what goes before it. A PyTorchJob has
        several pods; all of them are interrupted, as where a queue suspends it.
        """
        spec, container = pod_of(task)
        workers = workers_of(task)
        self.check_limits(namespace, container, max(1, len(workers)))
        image = self.image(container["image"])
        command = [*(prefix or []), *container.get("command", []), *(args.get(one, one) for one in container["args"])]
        roots = [self.folder / f"{name}{worker}".replace("/", "-") for worker in workers or [""]]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for root, more in zip(roots, workers.values() or [{}], strict=True):
                for inside in (HOME, TMP, "/var/lib/forge", image.workdir):
                    place(inside, image, root).mkdir(parents=True, exist_ok=True)
                try:
                    environment = self.environment(namespace, task, spec, container, env | more, image, root)
                    self.mount(namespace, spec, container, root)
                except LookupError as missing:  # a ConfigMap, a Secret or an account
                    raise NoPod(f"CreateContainerConfigError: {missing}") from None
                cwd = place(image.workdir, image, root)
                with (root / "log").open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                            stderr=subprocess.STDOUT, start_new_session=True,
                        )
                    )  # fmt: skip
            grace = float(spec.get("terminationGracePeriodSeconds", 30))
            in_time = wait(processes, roots, min(seconds, LONGEST), grace, interrupt)
        finally:
            kill_all(roots)
            codes = [one.wait() for one in processes]
        error = "" if in_time else f"task execution timeout [{min(seconds, LONGEST):g}s] expired"
        if written := image.written():
            error = f"PermissionError: user 1000 may not write {', '.join(written)}, which the image has"
        for root in roots:  # a pod's disk goes with it: nobody else ever reads a file there
            for part in root.iterdir():
                if part.is_dir():
                    shutil.rmtree(part)
        return Ended(next((code for code in codes if code), 0), read_logs(roots), error)

    def image(self, reference: str) -> Image:
        """An image by its reference, laid out when it is first wanted."""
        name = reference.rpartition("/")[2].partition(":")[0].removeprefix("forge-")
        if name not in self.images:
            self.images[name] = Image(self.project, name, self.folder / "images" / name)
        return self.images[name]

    def check_limits(self, namespace: str, container: Object, replicas: int) -> None:
        """Refuse what the namespace's quota and limit range do not let in, as the API server does."""
        asked = {GPU if kind == "gpu" else kind: quantity(amount)
                 for kind, amount in container.get("resources", {}).get("requests", {}).items()}  # fmt: skip
        for quota in self.objects.all("ResourceQuota", namespace):
            for kind, hard in quota["spec"]["hard"].items():
                wanted = replicas * asked.get(kind.removeprefix("requests."), 0)
                if wanted > quantity(hard):
                    which = f"exceeded quota: {quota['metadata']['name']}, requested: {kind}={wanted:g}"
                    raise NoPod(f"pods is forbidden: {which}, limited: {kind}={hard}")
        for limits in self.objects.all("LimitRange", namespace):
            for kind, most in limits["spec"]["limits"][0].get("max", {}).items():
                if asked.get(kind, 0) > quantity(most):
                    raise NoPod(f"pods is forbidden: maximum {kind} usage per Container is {most}")

    def environment(
        self, namespace: str, task: TaskTemplate, spec: Object, container: Object, env: dict[str, str],
        image: Image, root: Path,
    ) -> dict[str, str]:  # fmt: skip
        """The variables of the pod's process: the image's, the template's and Flyte's."""
        secrets = [{"secretRef": {"name": one}} for one in self.plugin.get("default-env-from-secrets", [])]
        given = {name: value for one in self.plugin.get("default-env-vars", []) for name, value in one.items()}
        wanted = []
        for secret in task.security_context.secrets:  # by Flyte's webhook
            reference = {"name": secret.group, "key": secret.key, "optional": True}
            for variable in (secret.env_var, f"_FSEC_{secret.group}_{secret.key}".upper()):
                wanted += [{"name": variable, "valueFrom": {"secretKeyRef": reference}}] if variable else []
        whole = {
            "envFrom": [*container.get("envFrom", []), *secrets],
            "env": [*container.get("env", []), *({"name": one, "value": given[one]} for one in given), *wanted],
        }
        found = image.environment | self.objects.environment(whole, namespace) | env
        ports = {str(int(one["containerPort"])): free_port() for one in container.get("ports", [])}
        if "FORGE_GPUS" in found and not self.gpus:
            found["FORGE_GPUS"] = "0"
        found |= {"HOSTNAME": root.name, "TMPDIR": TMP}
        here = {
            variable: ports.get(value) or self.reached(self.placed(value, image, root))
            for variable, value in found.items()
        }
        if spec.get("automountServiceAccountToken", True):  # in place of the files that a pod has
            account = spec.get("serviceAccountName", "default")
            here["KUBECONFIG"] = str(self.services.kubeconfig(namespace, account))
        return here

    def placed(self, value: str, image: Image, root: Path) -> str:
        """A value whose paths are those of a pod, with those that they have here."""
        if "://" in value:
            return value
        return ":".join(str(place(one, image, root)) if one.startswith("/") else one for one in value.split(":"))

    def reached(self, value: str) -> str:
        """A value whose URLs are those of a cluster, with those that its services have here."""

        def here(match: re.Match[str]) -> str:
            scheme, service, namespace, port = match.groups()
            if namespace not in self.namespaces:
                return match[0]
            url = f"{scheme}://{service}.{namespace}{port or ''}"
            assert url in self.services.urls, f"{url}: the services of these tests have none"
            return self.services.urls[url].rstrip("/")

        return HOST.sub(here, value)

    def mount(self, namespace: str, spec: Object, container: Object, root: Path) -> None:
        """The volumes that are not an empty directory: those that pods share, and what ConfigMaps and Secrets hold."""
        volumes = {one["name"]: one for one in spec.get("volumes", [])}
        for mount in container.get("volumeMounts", []):
            volume = volumes[mount["name"]]
            there = root / mount["mountPath"].lstrip("/")
            if claim := volume.get("persistentVolumeClaim"):
                shared = self.folder / "claims" / namespace / claim["claimName"] / mount.get("subPath", "")
                shared.mkdir(parents=True, exist_ok=True)
                there.parent.mkdir(parents=True, exist_ok=True)
                there.symlink_to(shared)
            for source in volume.get("projected", {}).get("sources", []):
                reference = {f"{kind}Ref": one for kind, one in source.items()}
                found = self.objects.environment({"envFrom": [reference]}, namespace)
                there.mkdir(parents=True, exist_ok=True)
                for key, value in found.items():
                    (there / key).write_text(value)


def pod_of(task: TaskTemplate) -> tuple[Object, Object]:
    """A task's pod, and its one container."""
    if task.HasField("k8s_pod"):
        spec: Object = MessageToDict(task.k8s_pod.pod_spec)
        (container,) = spec["containers"]
        return spec, container
    found: Object = MessageToDict(task.container)
    env = [{"name": one["key"], "value": one["value"]} for one in found.get("env", [])]
    return {"automountServiceAccountToken": False}, {"image": found["image"], "args": found["args"], "env": env}


def workers_of(task: TaskTemplate) -> dict[str, dict[str, str]]:
    """The pods of a PyTorchJob, and the variables by which the training-operator and Flyte have them find each other.

    Empty for other tasks.
    """
    job: dict[str, Any] = MessageToDict(task.custom) if task.type == "pytorch" else {}
    count, elastic = int(job.get("workerReplicas", {}).get("replicas", 0)), job.get("elasticConfig", {})
    common = {
        "PET_NNODES": f"{count}:{count}",
        "PET_NPROC_PER_NODE": f"{elastic.get('nprocPerNode', 1):g}",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "FLYTE_INTERNAL_DIST_ERROR_STRATEGY": "Earliest",
    }
    return {f"-worker-{one}": {**common, "FLYTE_INTERNAL_WORKER_NAME": f"worker-{one}"} for one in range(count)}


def quantity(text: str) -> float:
    """A quantity of Kubernetes."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def place(inside: str, image: Image, root: Path) -> Path:
    """Where a pod's path is here: in its image, on its own disk, or the machine's (programs)."""
    if inside.startswith("/opt/"):
        return image.root / inside[1:]
    return root / inside[1:] if inside.startswith((HOME, TMP, "/var/lib/", "/etc/forge")) else Path(inside)


def free_port() -> str:
    """A port of this machine: pods have all of theirs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait(
    processes: list[subprocess.Popen[bytes]], roots: list[Path], seconds: float, grace: float,
    interrupt: Interrupt | None,
) -> bool:  # fmt: skip
    """Wait until all have ended, or one has failed; whether that was in time. Interrupt them, if that is wanted."""
    deadline, told = time.monotonic() + seconds, False
    while running := [one for one in processes if one.poll() is None]:
        failed = any(one.returncode for one in processes)
        if not told and (failed or (interrupt and interrupt.text in read_logs(roots))):
            for one in running:
                one.send_signal(signal.SIGTERM if failed or interrupt is None else interrupt.number)
            deadline, told = time.monotonic() + grace, True
        if time.monotonic() > deadline:
            return told
        time.sleep(0.02)
    return True


def read_logs(roots: list[Path]) -> str:
    """What pods have printed."""
    return "".join((one / "log").read_text(errors="replace") for one in roots)


def kill_all(roots: list[Path]) -> None:
    """End what pods have left, by their homes, which no others have: processes may have left their groups."""
    homes = {str(one / HOME[1:]) for one in roots}
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") in homes:
                process.kill()
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
