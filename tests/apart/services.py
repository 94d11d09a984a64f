"""The services that the pods of a cluster use: S3, MLflow, the API server, vLLM and its reconciler."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from minio import Minio

from forge.core.settings import Settings
from tests.apart.manifests import Manifests, Object
from tests.apart.s3 import S3, serve
from tests.apart.serving import Serving, non_ephemeral_port
from tests.register.mlflow_servers import mlflow_server

VLLM_PYTHON = Settings().serving_python


class Services:
    """All services, with the access rights that a project's infra/ defines."""

    def __init__(self, manifests: Manifests, s3: S3, serving: Serving, urls: dict[str, str]) -> None:
        self.secrets, self.urls = manifests.secrets, urls
        self.s3_server, self.serving = s3, serving
        self.denied = s3.denied  # (user, action, resource)

    def s3(self, user: str) -> Minio:
        """A client of the S3 server with a user's credentials."""
        return self.s3_server.client(user)

    def kubeconfig(self, namespace: str, account: str) -> Path:
        """The kubeconfig of a ServiceAccount; raises LookupError if there is none."""
        return self.serving.kubeconfig(namespace, account)

    def desired(self) -> Object:
        """The document of what should be served."""
        return self.serving.desired()


@contextlib.contextmanager
def services(project: Path, folder: Path, vllm_python: Path = VLLM_PYTHON) -> Iterator[Services]:
    """Run the services of a project, with their files in a folder. They are ready on entry, and stopped on exit.

    vLLM starts once the reconciler has something for it to serve.
    """
    manifests = Manifests(project)
    urls: dict[str, str] = {}
    port = non_ephemeral_port()
    for name in ("s3", "mlflow", "serving"):
        (folder / name).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        database = f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"
        mlflow = stack.enter_context(in_background(pool, mlflow_server(database, folder / "mlflow", port)))
        s3 = stack.enter_context(serve(manifests, folder / "s3"))
        serving = Serving(manifests, folder / "serving", urls, vllm_python)
        stack.callback(serving.close)
        for service, url in {
            "minio.data-ml{}:30063": s3.url,
            "mlflow.ml-platform{}:5000": f"http://127.0.0.1:{port}",
            "vllm.ml-inference{}:8000": serving.vllm_url,
            "vllm-reconciler.ml-inference{}:8001": serving.reconciler_url,
        }.items():
            urls |= {f"http://{service.format(suffix)}": url for suffix in ("", ".svc", ".svc.cluster.local")}
        serving.start_reconciler()
        mlflow.result()
        yield Services(manifests, s3, serving, urls)


@contextlib.contextmanager
def in_background(pool: ThreadPoolExecutor, server: contextlib.AbstractContextManager[str]) -> Iterator[Future[str]]:
    """Start a server in the background; on exit, wait until it has started and stop it."""
    starting = pool.submit(server.__enter__)
    try:
        yield starting
    finally:
        with contextlib.suppress(Exception):
            starting.result()
            server.__exit__(None, None, None)
