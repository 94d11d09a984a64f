"""Pods as local processes. Each has the files of its image, the environment of its template and an empty disk."""

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
from tests.conftest import ONE_THREAD

MAX_SECONDS = 600  # a pod's time limit, whatever the timeout of its task
GPU = "nvidia.com/gpu"
HOST = re.compile(r"\b(https?)://([a-z0-9-]+)\.([a-z0-9-]+)(?:\.svc(?:\.cluster\.local)?)?(:\d+)?(?![\w.-])")
UNITS = {"": 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9}


class Services(Protocol):
    """What pods reach, and with which credentials."""

    urls: dict[str, str]  # from the cluster's service URLs to local ones
    secrets: dict[str, dict[str, str]]  # by namespace/name

    def s3(self, user: str) -> Minio:
        """A client of the S3 server with a user's credentials."""

    def kubeconfig(self, namespace: str, account: str) -> Path:
        """The kubeconfig of a ServiceAccount."""


class PodRejected(Exception):
    """The API server or the kubelet rejects a pod; the message says why."""


@dataclass(frozen=True)
class Interrupt:
    """A signal to send once a pod's log contains a text: SIGTERM as in a drain, SIGKILL as if the pod was lost."""

    text: str
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class PodResult:
    """How a pod ended: its exit code (negative for a signal), its log, and any other error."""

    code: int
    log: str
    error: str = ""


@dataclass(frozen=True)
class Objects(Manifests):
    """A project's objects. The keys of its Secrets have the values that the services use."""

    values: dict[str, dict[str, str]] = field(default_factory=dict)

    @functools.cached_property
    def secrets(self) -> dict[str, dict[str, str]]:
        """The content of the project's Secrets, by namespace/name."""
        declared = super().secrets
        return {name: {key: self.values[name][key] for key in keys if key in self.values.get(name, {})}
                for name, keys in declared.items()}  # fmt: skip


class Pods:
    """Runs the pods of a project's tasks. With `gpus`, they use the GPUs that they request; this machine has none."""

    def __init__(self, project: Path, services: Services, folder: Path, *, gpus: bool = False) -> None:
        self.project, self.services, self.folder, self.gpus = project, services, folder, gpus
        self.objects = Objects(project, services.secrets)
        values = self.objects.find("HelmRelease", "ml-platform", "flyte")["spec"]["values"]
        self.plugin: Object = values["configuration"]["inline"]["plugins"]["k8s"]
        self.namespaces = {folder.name for folder in (project / "infra" / "apps").iterdir()}
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
        seconds: float = MAX_SECONDS,
        interrupt: Interrupt | None = None,
    ) -> PodResult:
        """Run a task's pod to its end and leave no process behind; raises PodRejected if it can't be created.

        `args` maps placeholders of the command to values; `prefix` goes before the command. A PyTorchJob has several
        pods, and an interrupt goes to all of them, as when a queue suspends the job.
        """
        spec, container = pod_of(task)
        workers = workers_of(task)
        self.check_limits(namespace, container, max(1, len(workers)))
        image = self.image(container["image"])
        command = [*(prefix or []), *container.get("command", []), *(args.get(arg, arg) for arg in container["args"])]
        roots = [self.folder / f"{name}{worker}".replace("/", "-") for worker in workers or [""]]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for root, worker_env in zip(roots, workers.values() or [{}], strict=True):
                for directory in (HOME, TMP, "/var/lib/forge", image.workdir):
                    local_path(directory, image, root).mkdir(parents=True, exist_ok=True)
                try:
                    environment = self.environment(namespace, task, spec, container, env | worker_env, image, root)
                    self.mount(namespace, spec, container, root)
                except LookupError as missing:  # no such ConfigMap, Secret or ServiceAccount
                    raise PodRejected(f"CreateContainerConfigError: {missing}") from None
                cwd = local_path(image.workdir, image, root)
                with (root / "log").open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                            stderr=subprocess.STDOUT, start_new_session=True,
                        )
                    )  # fmt: skip
            grace = float(spec.get("terminationGracePeriodSeconds", 30))
            in_time = wait(processes, roots, min(seconds, MAX_SECONDS), grace, interrupt)
        finally:
            kill_all(roots)
            codes = [process.wait() for process in processes]
        error = "" if in_time else f"task execution timeout [{min(seconds, MAX_SECONDS):g}s] expired"
        if written := image.undo_writes():
            error = f"PermissionError: user 1000 may not write {', '.join(written)}, which the image has"
        for root in roots:  # delete the pod's disk, so that no other pod can read its files
            for entry in root.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
        return PodResult(next((code for code in codes if code), 0), read_logs(roots), error)

    def image(self, reference: str) -> Image:
        """An image by its reference, laid out on first use."""
        name = reference.rpartition("/")[2].partition(":")[0].removeprefix("forge-")
        if name not in self.images:
            self.images[name] = Image(self.project, name, self.folder / "images" / name)
        return self.images[name]

    def check_limits(self, namespace: str, container: Object, replicas: int) -> None:
        """Reject a pod over the namespace's quota or limit range, as the API server does."""
        requests = {GPU if kind == "gpu" else kind: quantity(amount)
                 for kind, amount in container.get("resources", {}).get("requests", {}).items()}  # fmt: skip
        for quota in self.objects.all("ResourceQuota", namespace):
            for kind, hard in quota["spec"]["hard"].items():
                requested = replicas * requests.get(kind.removeprefix("requests."), 0)
                if requested > quantity(hard):
                    excess = f"exceeded quota: {quota['metadata']['name']}, requested: {kind}={requested:g}"
                    raise PodRejected(f"pods is forbidden: {excess}, limited: {kind}={hard}")
        for limits in self.objects.all("LimitRange", namespace):
            for kind, limit in limits["spec"]["limits"][0].get("max", {}).items():
                if requests.get(kind, 0) > quantity(limit):
                    raise PodRejected(f"pods is forbidden: maximum {kind} usage per Container is {limit}")

    def environment(
        self, namespace: str, task: TaskTemplate, spec: Object, container: Object, env: dict[str, str],
        image: Image, root: Path,
    ) -> dict[str, str]:  # fmt: skip
        """The variables of a pod's process, from its image, its template and Flyte."""
        secrets = [{"secretRef": {"name": name}} for name in self.plugin.get("default-env-from-secrets", [])]
        defaults = {name: value for item in self.plugin.get("default-env-vars", []) for name, value in item.items()}
        injected = []
        for secret in task.security_context.secrets:  # as Flyte's webhook does
            reference = {"name": secret.group, "key": secret.key, "optional": True}
            for variable in (secret.env_var, f"_FSEC_{secret.group}_{secret.key}".upper()):
                injected += [{"name": variable, "valueFrom": {"secretKeyRef": reference}}] if variable else []
        extended = {
            "envFrom": [*container.get("envFrom", []), *secrets],
            "env": [
                *container.get("env", []),
                *({"name": name, "value": defaults[name]} for name in defaults),
                *injected,
            ],
        }
        found = image.environment | self.objects.environment(extended, namespace) | env
        ports = {str(int(port["containerPort"])): free_port() for port in container.get("ports", [])}
        if "FORGE_GPUS" in found and not self.gpus:
            found["FORGE_GPUS"] = "0"
        found |= {"HOSTNAME": root.name, "TMPDIR": TMP, **ONE_THREAD}
        local = {
            variable: ports.get(value) or self.with_local_urls(self.with_local_paths(value, image, root))
            for variable, value in found.items()
        }
        if spec.get("automountServiceAccountToken", True):  # instead of the files in a real pod
            account = spec.get("serviceAccountName", "default")
            local["KUBECONFIG"] = str(self.services.kubeconfig(namespace, account))
        return local

    def with_local_paths(self, value: str, image: Image, root: Path) -> str:
        """A value with local paths instead of the pod's."""
        if "://" in value:
            return value
        return ":".join(
            str(local_path(part, image, root)) if part.startswith("/") else part for part in value.split(":")
        )

    def with_local_urls(self, value: str) -> str:
        """A value with local URLs instead of the cluster's."""

        def local_url(match: re.Match[str]) -> str:
            scheme, service, namespace, port = match.groups()
            if namespace not in self.namespaces:
                return match[0]
            url = f"{scheme}://{service}.{namespace}{port or ''}"
            assert url in self.services.urls, f"{url} is not among the services of these tests"
            return self.services.urls[url].rstrip("/")

        return HOST.sub(local_url, value)

    def mount(self, namespace: str, spec: Object, container: Object, root: Path) -> None:
        """Mount the volumes that are not empty: claims, which pods share, and files from ConfigMaps and Secrets."""
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for mount in container.get("volumeMounts", []):
            volume = volumes[mount["name"]]
            target = root / mount["mountPath"].lstrip("/")
            if claim := volume.get("persistentVolumeClaim"):
                shared = self.folder / "claims" / namespace / claim["claimName"] / mount.get("subPath", "")
                shared.mkdir(parents=True, exist_ok=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(shared)
            for source in volume.get("projected", {}).get("sources", []):
                reference = {f"{kind}Ref": projection for kind, projection in source.items()}
                found = self.objects.environment({"envFrom": [reference]}, namespace)
                target.mkdir(parents=True, exist_ok=True)
                for key, value in found.items():
                    (target / key).write_text(value)


def pod_of(task: TaskTemplate) -> tuple[Object, Object]:
    """A task's pod spec and its only container."""
    if task.HasField("k8s_pod"):
        spec: Object = MessageToDict(task.k8s_pod.pod_spec)
        (container,) = spec["containers"]
        return spec, container
    found: Object = MessageToDict(task.container)
    env = [{"name": pair["key"], "value": pair["value"]} for pair in found.get("env", [])]
    return {"automountServiceAccountToken": False}, {"image": found["image"], "args": found["args"], "env": env}


def workers_of(task: TaskTemplate) -> dict[str, dict[str, str]]:
    """The workers of a PyTorchJob by name suffix, with the variables that the training-operator and Flyte set.

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
    return {f"-worker-{n}": {**common, "FLYTE_INTERNAL_WORKER_NAME": f"worker-{n}"} for n in range(count)}


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def local_path(path: str, image: Image, root: Path) -> Path:
    """The local path for a path in a pod: in its image, on its own disk, or the same path, for programs."""
    if path.startswith("/opt/"):
        return image.root / path[1:]
    return root / path[1:] if path.startswith((HOME, TMP, "/var/lib/", "/etc/forge")) else Path(path)


def free_port() -> str:
    """A free port. Real pods have their own ports; here they share this machine's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait(
    processes: list[subprocess.Popen[bytes]], roots: list[Path], seconds: float, grace: float,
    interrupt: Interrupt | None,
) -> bool:  # fmt: skip
    """Wait for processes; returns whether they ended in time. Signals them all if one fails or `interrupt` is due."""
    deadline, signalled = time.monotonic() + seconds, False
    while running := [process for process in processes if process.poll() is None]:
        failed = any(process.returncode for process in processes)
        if not signalled and (failed or (interrupt and interrupt.text in read_logs(roots))):
            for process in running:
                process.send_signal(signal.SIGTERM if failed or interrupt is None else interrupt.number)
            deadline, signalled = time.monotonic() + grace, True
        if time.monotonic() > deadline:
            return signalled
        time.sleep(0.02)
    return True


def read_logs(roots: list[Path]) -> str:
    """The logs of pods."""
    return "".join((root / "log").read_text(errors="replace") for root in roots)


def kill_all(roots: list[Path]) -> None:
    """Kill what pods have left running. Processes may leave their group, so HOME shows which pod they belong to."""
    homes = {str(root / HOME[1:]) for root in roots}
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") in homes:
                process.kill()
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
