"""Where models are served: on this machine, or on the cluster."""

from typing import Protocol

import urllib3

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.serving.desired import Actual, DesiredStore, Serving, read_document
from forge.serving.local_target import FileDocument, LocalTarget
from forge.serving.vllm_client import UNREACHABLE

DOCUMENT = "vllm-desired"  # the ConfigMap with the desired state


class Target(Protocol):
    """The document of the desired state, the reconciler's report, and the URL for clients."""

    document: DesiredStore
    endpoint: str

    def status(self) -> Actual | None:
        """The reconciler's report; None if it doesn't answer."""

    def ensure(self) -> None:
        """Start the reconciler if it isn't running."""


class ClusterTarget:
    """The cluster's vLLM. Kubernetes keeps its reconciler running."""

    def __init__(self, settings: Settings) -> None:
        from forge.serving.kubernetes_target import ConfigMapDocument, open_cluster

        self.settings = settings
        self.document: DesiredStore = ConfigMapDocument(open_cluster(), settings.serving_namespace, DOCUMENT)
        self.endpoint = settings.endpoint

    def status(self) -> Actual | None:
        """See Target."""
        url = f"{self.settings.reconciler_url.rstrip('/')}/status"
        try:
            return Actual.model_validate_json(urllib3.request("GET", url, retries=False, timeout=5).data)
        except UNREACHABLE:
            return None

    def ensure(self) -> None:
        """Does nothing: Kubernetes restarts the reconciler."""


def read_serving(settings: Settings) -> Serving:
    """What should be served, leaving out a rollout in progress. On the cluster the reconciler is asked, not Kubernetes,
    so no rights are needed. ForgeError if it can't be read.
    """
    if settings.serving_target == "local":
        desired, _ = FileDocument(settings).read()
    elif not settings.reconciler_url:
        raise ForgeError("is kubernetes", where="FORGE_SERVING_TARGET", fix="set FORGE_RECONCILER_URL too")
    else:
        url = f"{settings.reconciler_url.rstrip('/')}/desired"
        try:
            answer = urllib3.request("GET", url, retries=False, timeout=5)
        except UNREACHABLE as error:
            raise ForgeError(
                f"no answer ({error})", where=url, fix="start the reconciler, or fix FORGE_RECONCILER_URL"
            ) from None
        if answer.status != 200:
            raise ForgeError(f"answers {answer.status}: the reconciler hasn't read the desired state yet", where=url)
        desired = read_document(answer.data.decode(), url)
    return desired.trial.before if desired.trial else desired.serving


def open_target(settings: Settings) -> Target:
    """The target of the settings; ForgeError if they lack its URLs."""
    if settings.serving_target == "local":
        return LocalTarget(settings)
    if not settings.serving_url or not settings.reconciler_url:
        raise ForgeError(
            "is kubernetes", where="FORGE_SERVING_TARGET", fix="set FORGE_SERVING_URL and FORGE_RECONCILER_URL too"
        )
    return ClusterTarget(settings)
