"""`python -m forge.serving ask|start|stop|remove|reconcile`: the served model, by hand and beside vLLM."""

import functools
import json
import logging
import os
import signal
from types import FrameType

import click
from filelock import FileLock, Timeout
from openai import OpenAIError

from forge.core.errors import ForgeError
from forge.core.logs import start_logging
from forge.core.processes import start_ticks
from forge.core.settings import Settings, load_settings
from forge.registry.packages import PACKAGE
from forge.serving.client import chat as ask_once
from forge.serving.client import client_of
from forge.serving.desired import Conflict, Desired, Server
from forge.serving.local_target import LocalTarget, reconciler_lock, reconciler_version
from forge.serving.plan import remove as without
from forge.serving.reconciler import Reconciler, run
from forge.serving.reconciler_status import Status
from forge.serving.served_files import fetch_served
from forge.serving.targets import open_target
from forge.serving.trial import Recovery
from forge.serving.vllm_process import LocalServer
from forge.storage import open_store, write_atomically

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between the reconciler's looks at a file of this machine
POLL_CLUSTER = 1.0  # and at Kubernetes' API


@click.group()
def cli() -> None:
    """The models that serve."""


@cli.command()
@click.argument("question")
@click.option("--name", default="", help="the public name; needed where there are several")
def ask(question: str, name: str) -> None:
    """Ask a served model one question."""
    settings = load_settings()
    desired, _ = open_target(settings).document.read()
    public = sorted(desired.serving.names)
    if not public:
        raise ForgeError("nothing is serving; start it with: make run")
    if name not in public and (name or len(public) > 1):
        raise ForgeError(f"--name {name}: served are {', '.join(public)}; give one of them")
    try:
        messages = [{"role": "user", "content": question}]
        click.echo(ask_once(client_of(settings.endpoint), name or public[0], messages))
    except OpenAIError as error:
        raise ForgeError(
            f"the server did not answer ({error}); start it: python -m forge.serving start; see {settings.serving}"
        ) from None


@cli.command()
def start() -> None:
    """Serve again what should be served: after `stop`, or after the machine was started."""
    target = LocalTarget(here(load_settings()))
    desired, _ = target.document.read()
    if desired.serving.base is None:
        raise ForgeError("there is nothing to serve yet; train a model: make run")
    target.ensure()
    click.echo(f"{', '.join(sorted(desired.serving.names))} will be served; see {target.log}")


@cli.command()
def stop() -> None:
    """Stop serving on this machine; `start` goes on from there."""
    settings = here(load_settings())
    target = LocalTarget(settings)
    desired, _ = target.document.read()
    target.stop()
    with FileLock(reconciler_lock(settings), timeout=10):  # so that none starts vLLM again meanwhile
        stopped = LocalServer(settings).stop()
    names = ", ".join(sorted(desired.serving.names))
    click.echo(f"Stopped {names or 'the server'}." if stopped else "Nothing is serving.")


@cli.command()
@click.argument("name")
def remove(name: str) -> None:
    """Serve a public name no longer. The registry keeps its versions."""
    settings = load_settings()
    target = open_target(settings)
    recovery = Recovery(lambda: open_store(settings), settings)
    while True:
        recovery(target.document)
        desired, revision = target.document.read()
        if name not in desired.serving.names:
            raise ForgeError(f"{name} is not served; served are {', '.join(sorted(desired.serving.names)) or 'none'}")
        if desired.trial is not None:
            raise ForgeError(f"a rollout of {desired.trial.of.versioned} is under way; wait until it has ended")
        changed = Desired(generation=desired.generation + 1, serving=without(desired.serving, name))
        try:
            target.document.write(changed, revision)
            break
        except Conflict:
            continue
    click.echo(f"{name} is served no longer.")


@cli.command()
def reconcile() -> None:
    """Make what is served what should be, until told to end; vLLM is left as it is then."""
    start_logging("reconciler")
    settings = load_settings()
    local = settings.serving_target == "local"
    settings.serving.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(reconciler_lock(settings))
        lock.acquire(timeout=5)  # somebody may be looking whether it is held
    except Timeout:
        raise ForgeError(f"another reconciler holds {reconciler_lock(settings)}") from None
    store = functools.cache(lambda: open_store(settings))  # when it is needed first: it may be away now
    server: Server = LocalServer(settings)
    if not local:
        from forge.serving.kubernetes_target import KubernetesServer, open_cluster

        server = KubernetesServer(open_cluster(patience=10), settings.serving_namespace, "vllm", settings.serving_url)
    reconciler = Reconciler(
        open_target(settings).document,
        server,
        lambda one: fetch_served(one, settings, store()),
        lambda one: store().release(one.uri) if PACKAGE.fullmatch(one.uri) else None,
        Recovery(store, settings),
        settings.serving / "names.json",
        tell=log.info,
    )
    status = Status(reconciler, "127.0.0.1" if local else "0.0.0.0", settings.reconciler_port)  # noqa: S104
    record = settings.serving / "reconciler.json"
    ended = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    me = {
        "pid": os.getpid(),
        "ticks": start_ticks(os.getpid()),
        "port": status.port,
        "made_of": reconciler_version(settings),
    }
    write_atomically(record, json.dumps(me))

    # On a cluster there may be something to serve later, and Kubernetes would only start it again.
    run(reconciler, POLL if local else POLL_CLUSTER, lambda: ended, status.touch, forever=not local)
    record.unlink(missing_ok=True)


def here(settings: Settings) -> Settings:
    """The settings; ForgeError where they say that the cluster serves."""
    if settings.serving_target != "local":
        raise ForgeError(
            "FORGE_SERVING_TARGET is kubernetes: start and stop are for this machine; scale the Deployment"
        )
    return settings


if __name__ == "__main__":
    cli()
