"""`python -m forge.serving reconcile`: the reconciler, which LocalTarget starts here and a Deployment on a cluster."""

import functools
import json
import os
import signal
from types import FrameType

import click
from filelock import FileLock, Timeout

from forge.core.errors import ForgeError
from forge.core.logs import start_logging
from forge.core.processes import start_ticks
from forge.core.settings import load_settings
from forge.registry.packages import PACKAGE
from forge.serving.desired import Server
from forge.serving.local_target import reconciler_lock, reconciler_version
from forge.serving.reconciler import Reconciler, run
from forge.serving.reconciler_status import Status
from forge.serving.served_files import fetch_served
from forge.serving.targets import open_target
from forge.serving.trial import Recovery
from forge.serving.vllm_process import LocalServer
from forge.storage import open_store, write_atomically

POLL = 0.1  # seconds between two reads of the desired state, if it is a file
POLL_CLUSTER = 1.0  # and if it is a ConfigMap


@click.group()
def cli() -> None:
    """The program that runs next to vLLM."""


@cli.command()
def reconcile() -> None:
    """Serve the desired state until SIGTERM or SIGINT, which leave vLLM running."""
    start_logging("reconciler")
    settings = load_settings()
    local = settings.serving_target == "local"
    settings.serving.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(reconciler_lock(settings))
        lock.acquire(timeout=5)  # another process may hold it for a moment, to see whether a reconciler runs
    except Timeout:
        raise ForgeError("another reconciler is running", where=str(reconciler_lock(settings))) from None
    store = functools.cache(lambda: open_store(settings))  # opened on first use: it may be unreachable now
    server: Server = LocalServer(settings)
    if not local:
        from forge.serving.kubernetes_target import KubernetesServer, open_cluster

        server = KubernetesServer(open_cluster(patience=10), settings.serving_namespace, "vllm", settings.serving_url)
    reconciler = Reconciler(
        open_target(settings).document,
        server,
        lambda served: fetch_served(served, settings, store()),
        lambda served: store().release(served.uri) if PACKAGE.fullmatch(served.uri) else None,
        Recovery(store, settings),
        settings.serving / "names.json",
    )
    status = Status(reconciler, "127.0.0.1" if local else "0.0.0.0", settings.reconciler_port)  # noqa: S104
    record = settings.serving / "reconciler.json"
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    this_process = {
        "pid": os.getpid(),
        "ticks": start_ticks(os.getpid()),
        "port": status.port,
        "version": reconciler_version(settings),
    }
    write_atomically(record, json.dumps(this_process))

    # On a cluster there may be something to serve later, and Kubernetes would restart a process that exits.
    run(reconciler, POLL if local else POLL_CLUSTER, lambda: stopping, status.touch, forever=not local)
    record.unlink(missing_ok=True)


if __name__ == "__main__":
    cli()
