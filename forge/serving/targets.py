"""Where a rollout takes place: on this machine, or on the cluster."""

from typing import Protocol

import urllib3

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.serving.desired import Actual, DesiredStore, Serving, read_document
from forge.serving.local_target import FileDocument, LocalTarget
from forge.serving.vllm_client import UNREACHABLE

DOCUMENT = "vllm-desired"  # the ConfigMap, of which the cluster's reconciler and rollouts know


class Target(Protocol):
    """The document of what should be served, and what is said of it."""

    document: DesiredStore
    endpoint: str

    def status(self) -> Actual | None:
        """What the reconciler reports, or None where it does not answer."""

    def ensure(self) -> None:
        """See to it that a reconciler runs."""


class ClusterTarget:
    """The cluster's vLLM, whose reconciler Kubernetes keeps running."""

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
        """Nothing to do: Kubernetes starts it again."""


def read_serving(settings: Settings) -> Serving:
    """What should be served now, before any rollout that is under way, for who may not ask Kubernetes.

    ForgeError where it can't be read.
    """
    if settings.serving_target == "local":
        desired, _ = FileDocument(settings).read()
    elif not settings.reconciler_url:
        raise ForgeError("FORGE_SERVING_TARGET is kubernetes: set FORGE_RECONCILER_URL too")
    else:
        url = f"{settings.reconciler_url.rstrip('/')}/desired"
        try:
            answer = urllib3.request("GET", url, retries=False, timeout=5)
        except UNREACHABLE as error:
            raise ForgeError(f"{url}: no answer ({error}); start the reconciler, or fix FORGE_RECONCILER_URL") from None
        if answer.status != 200:
            raise ForgeError(f"{url}: answers {answer.status}: the reconciler has yet to read what it should serve")
        desired = read_document(answer.data.decode(), url)
    return desired.trial.before if desired.trial else desired.serving


def open_target(settings: Settings) -> Target:
    """The target of the settings; ForgeError where they do not say where it is."""
    if settings.serving_target == "local":
        return LocalTarget(settings)
    if not settings.serving_url or not settings.reconciler_url:
        raise ForgeError("FORGE_SERVING_TARGET is kubernetes: set FORGE_SERVING_URL and FORGE_RECONCILER_URL too")
    return ClusterTarget(settings)
