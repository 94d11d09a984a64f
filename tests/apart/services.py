"""What the pods of a cluster reach: an S3 server, MLflow, an API server, vLLM and its reconciler."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from minio import Minio

from forge.core.settings import Settings
from tests.apart.manifests import Manifests, Object
from tests.apart.s3 import S3, serve
from tests.apart.serving import Serving, quiet_port
from tests.register.mlflow_servers import mlflow_server

VLLM_PYTHON = Settings().serving_python


class Services:
    """All of them, by what `infra/` of a project says of who may do what."""

    def __init__(self, manifests: Manifests, s3: S3, serving: Serving, urls: dict[str, str]) -> None:
        self.secrets, self.urls = manifests.secrets, urls
        self.policed, self.serving = s3, serving
        self.denied = s3.denied  # (user, action, resource)

    def s3(self, user: str) -> Minio:
        """The S3 server, as a user of it."""
        return self.policed.client(user)

    def kubeconfig(self, namespace: str, account: str) -> Path:
        """How a ServiceAccount reaches the API server; LookupError where there is none."""
        return self.serving.kubeconfig(namespace, account)

    def desired(self) -> Object:
        """The document of what should be served."""
        return self.serving.desired()


@contextlib.contextmanager
def services(project: Path, folder: Path, vllm_python: Path = VLLM_PYTHON) -> Iterator[Services]:
    """The services of a project, with what they write in a folder. All of them answer, and end at the end.

    vLLM is started when the reconciler gives it something to serve.
    """
    manifests = Manifests(project)
    urls: dict[str, str] = {}
    port = quiet_port()
    for name in ("s3", "mlflow", "serving"):
        (folder / name).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        database = f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"
        mlflow = stack.enter_context(beside(pool, mlflow_server(database, folder / "mlflow", port)))
        s3 = stack.enter_context(serve(manifests, folder / "s3"))
        serving = Serving(manifests, folder / "serving", urls, vllm_python)
        stack.callback(serving.close)
        for service, url in {
            "minio.data-ml{}:30063": s3.url,
            "mlflow.ml-platform{}:5000": f"http://127.0.0.1:{port}",
            "vllm.ml-inference{}:8000": serving.vllm_url,
            "vllm-reconciler.ml-inference{}:8001": serving.reconciler_url,
        }.items():
            urls |= {f"http://{service.format(more)}": url for more in ("", ".svc", ".svc.cluster.local")}
        serving.start_reconciler()
        mlflow.result()
        yield Services(manifests, s3, serving, urls)


@contextlib.contextmanager
def beside(pool: ThreadPoolExecutor, server: contextlib.AbstractContextManager[str]) -> Iterator[Future[str]]:
    """A server that starts meanwhile, and is ended whether it has started or not."""
    starting = pool.submit(server.__enter__)
    try:
        yield starting
    finally:
        with contextlib.suppress(Exception):
            starting.result()
            server.__exit__(None, None, None)
