"""The serving side: an API server with RBAC, a kubelet that runs vLLM for its pod, and the reconciler's pod.

vLLM runs on the CPU and listens on a local port; everything else follows the manifests.
"""

import asyncio
import contextlib
import copy
import functools
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from kmock import KubernetesError

from forge.core.contracts import Engine
from forge.serving.desired import Failed
from forge.serving.engine import on_cpu
from forge.serving.vllm_client import VLLM
from forge.serving.vllm_environment import ENVIRONMENT
from tests.apart.images import HOME, Image
from tests.apart.manifests import Manifests, Object
from tests.conftest import ONE_THREAD
from tests.register.mlflow_servers import answers, wait_until
from tests.serving.fake_cluster import CONFIGMAPS, DEPLOYMENTS, NAMESPACE, PODS, VERBS, FakeCluster, Running

CPU = {"VLLM_CPU_KVCACHE_SPACE": ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"]}  # what vLLM needs in addition on a CPU
STEP = 0.05  # seconds between steps of the controllers
TAIL = 4000  # characters shown of a log


class ApiServer(FakeCluster):
    """The API server. Each ServiceAccount may do exactly what the Roles of infra/ grant it."""

    def __init__(self, manifests: Manifests) -> None:
        super().__init__()
        self.manifests = manifests
        self.accounts: dict[str, tuple[str, str]] = {}  # (namespace, name) by token
        self.put(DEPLOYMENTS, copy.deepcopy(manifests.find("Deployment", NAMESPACE, "vllm")))
        self.deployment["spec"].setdefault("replicas", 1)
        self.put(CONFIGMAPS, copy.deepcopy(manifests.find("ConfigMap", NAMESPACE, "vllm-desired")))

    def token(self, namespace: str, account: str) -> str:
        """A token for a ServiceAccount; raises LookupError if there is none, as for a pod that names it."""
        if account != "default":  # Kubernetes creates that one itself
            self.manifests.find("ServiceAccount", namespace, account)
        token = secrets.token_hex()
        self.accounts[token] = namespace, account
        return token

    async def _handle(self, request: Any) -> Any:
        account = self.accounts.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if account is None:
            raise KubernetesError(status=401, reason="Unauthorized", message="Unauthorized")
        if not self._grants(account, request):
            user, resource = "system:serviceaccount:{}:{}".format(*account), request.resource.plural
            message = f'{resource} "{request.name}" is forbidden: User "{user}" cannot {VERBS[request.action]} '
            message += f'resource "{resource}" in the namespace "{request.namespace}"'
            raise KubernetesError(status=403, reason="Forbidden", message=message)
        return await super()._handle(request)

    def _grants(self, account: tuple[str, str], request: Any) -> bool:
        subject = {"kind": "ServiceAccount", "namespace": account[0], "name": account[1]}
        resource = "/".join(filter(None, (request.resource.plural, request.subresource)))
        for binding in self.manifests.all("RoleBinding", request.namespace):
            if subject in binding["subjects"] and binding["roleRef"]["kind"] == "Role":
                role = self.manifests.find("Role", request.namespace, binding["roleRef"]["name"])
                for rule in role["rules"]:
                    named = rule.get("resourceNames") or [request.name]
                    covered = request.resource.group in rule["apiGroups"] and resource in rule["resources"]
                    if covered and VERBS[request.action] in rule["verbs"] and request.name in named:
                        return True
        return False


class Process:
    """A container's process, with its children and its log."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, env=environment, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def alive(self) -> bool:
        """Whether the process is running."""
        return self.process.poll() is None

    def stop(self, grace: float) -> None:
        """Terminate the process; kill it after `grace` seconds, and any children that it leaves."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-TAIL:]


class Serving:
    """The namespace of vLLM. `urls` maps the cluster's service URLs to local ones."""

    def __init__(self, manifests: Manifests, folder: Path, urls: dict[str, str], vllm_python: Path) -> None:
        self.manifests, self.folder, self.urls, self.vllm_python = manifests, folder, urls, vllm_python
        self.vllm_url, self.reconciler_url = (f"http://127.0.0.1:{non_ephemeral_port()}" for _ in range(2))
        self.vllm_log, self.reconciler_log = folder / "vllm.log", folder / "reconciler.log"
        self.vllm: Process | None = None
        self.reconciler: Process | None = None
        self.state = ""  # of vLLM's pod; FakeCluster has a method pod_* for each state
        self.api = ApiServer(manifests)
        self.server = Running(self.api)
        self.ended = threading.Event()
        self.controllers = ThreadPoolExecutor(1).submit(self._run_controllers)

    @functools.cached_property
    def image(self) -> Image:
        """The reconciler's image, laid out."""
        return Image(self.manifests.project, "pipeline", self.folder / "image")

    def kubeconfig(self, namespace: str, account: str) -> Path:
        """The kubeconfig of a ServiceAccount; raises LookupError if there is none."""
        path = self.folder / f"kubeconfig-{namespace}-{account}"
        return path if path.exists() else self.server.kubeconfig(path, self.api.token(namespace, account))

    def desired(self) -> Object:
        """The document of what should be served."""
        return dict(json.loads(self.api.find(CONFIGMAPS, "vllm-desired")["data"]["desired.json"]))

    def close(self) -> None:
        """Stop everything; raises the error that ended the controllers, if any."""
        self.ended.set()
        wait([self.controllers])
        self.stop_reconciler()
        if self.vllm:
            self.vllm.stop(grace=20)
        self.server.close()
        self.controllers.result()

    # The reconciler.

    def start_reconciler(self) -> None:
        """Start the reconciler's pod and wait until it answers; raises AssertionError with its log if it does not."""
        spec = self.manifests.find("Deployment", NAMESPACE, "vllm-reconciler")["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        environment = self._environment(spec, container, self.image.environment)
        # In place of the Hugging Face hub, the API server rejects downloads at once.
        environment |= {
            "FORGE_RECONCILER_PORT": self.reconciler_url.rpartition(":")[2],
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.port}",
        }
        if spec.get("automountServiceAccountToken", True):
            account = spec.get("serviceAccountName", "default")
            environment["KUBECONFIG"] = str(self.kubeconfig(NAMESPACE, account))
        self.reconciler = Process(container["command"], environment, self.reconciler_log)
        try:
            wait_until(lambda: answers(f"{self.reconciler_url}/healthz"), self.reconciler.process)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.reconciler.tail()}") from None

    def stop_reconciler(self) -> None:
        """Stop the reconciler's pod."""
        if self.reconciler:
            self.reconciler.stop(grace=10)

    # The kubelet of vLLM's node, and the controllers.

    def _run_controllers(self) -> None:
        while not self.ended.wait(STEP):
            (pod,) = self._in_loop(lambda: self.api.pods) or [None]
            if pod is None or "deletionTimestamp" in pod["metadata"]:
                if self.vllm:
                    self.vllm.stop(pod["spec"]["terminationGracePeriodSeconds"] if pod else 0)
                self.vllm, self.state = None, ""
            else:
                self._sync_pod(pod)
            self._in_loop(self.api.advance)

    def _sync_pod(self, pod: Object) -> None:
        """Start a pod's vLLM, and report its state. vLLM is restarted only if it ends after it was ready."""
        died = self.vllm is not None and self.state == "ready" and not self.vllm.alive()
        if self.vllm and died:
            self.vllm.stop(grace=0)
        if self.vllm is None or died:
            self.vllm = self._start_vllm(pod["spec"]) if "args" in pod["spec"]["containers"][0] else None
        state = "silent"
        if self.vllm and not self.vllm.alive():
            state = "crashing"
        elif self.vllm and ((self.state == "ready" and not died) or VLLM(self.vllm_url).healthy()):
            state = "ready"
        self.api.log = self.vllm.tail() if self.vllm else ""
        if state != self.state:
            self.state = state
            status = getattr(self.api, f"pod_{state}")(pod)
            self._in_loop(
                lambda: self.api.edit(lambda stored: stored["status"].update(status), PODS, pod["metadata"]["name"])
            )

    def _start_vllm(self, spec: Object) -> Process:
        (middleware,), (container,) = spec["initContainers"], spec["containers"]
        environment = self._environment(spec, middleware, self.image.environment)
        command = self._with_local_paths(spec, middleware, middleware["command"])
        Process(command, environment, self.vllm_log).process.wait()
        environment = self._environment(spec, container, {"PATH": os.environ["PATH"], **CPU, **ONE_THREAD})
        args = list(container["args"])
        for option, value in zip(("--host", "--port"), self.vllm_url.removeprefix("http://").split(":"), strict=True):
            args[args.index(option) + 1] = value
        if "--tensor-parallel-size" in args:  # this machine has no GPUs
            at = args.index("--tensor-parallel-size")
            del args[at : at + 2]
        with contextlib.suppress(Failed):  # vLLM reports the same error
            args += on_cpu(args[args.index("--model") + 1], Engine(max_loras="--enable-lora" in args))
        return Process([str(self.vllm_python), *container["command"][1:], *args], environment, self.vllm_log)

    def _environment(self, spec: Object, container: Object, image: dict[str, str]) -> dict[str, str]:
        found = image | self.manifests.environment(container, NAMESPACE)
        names, values = found.keys(), self._with_local_paths(spec, container, [*found.values()])
        return {name: self.urls.get(value, value) for name, value in zip(names, values, strict=True)}

    def _with_local_paths(self, spec: Object, container: Object, values: list[str]) -> list[str]:
        """Values with local paths instead of a container's: on the node, in the pod, or in the image."""
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        local_paths = {"/opt": self.image.root / "opt", HOME: self.folder / "pod" / HOME[1:]}
        for mount in container["volumeMounts"]:
            on_node = volumes[mount["name"]].get("hostPath", {}).get("path", "")
            local_paths[mount["mountPath"]] = self.folder / (f"node{on_node}" if on_node else f"pod/{mount['name']}")
        for path in local_paths.values():
            path.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(f"(?<![^:=\\s\"'])({'|'.join(map(re.escape, local_paths))})(?=[/:\\s\"']|$)")
        return [pattern.sub(lambda match: str(local_paths[match[1]]), value) for value in values]

    def _in_loop(self, function: Callable[[], Any]) -> Any:
        """Call a function in the server's event loop, between two requests."""

        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.server.loop).result(30)


def non_ephemeral_port() -> int:
    """A free port below the ephemeral range, so that no outgoing connection takes it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
