"""`forge ask|status|start|stop|remove`: the models that serve."""

import json
from typing import TYPE_CHECKING

import click

from forge.core.errors import ForgeError

if TYPE_CHECKING:
    from rich.table import Table

    from forge.core.settings import Settings
    from forge.serving.desired import Actual, Desired


@click.command()
@click.argument("question")
@click.option("--name", default="", help="The public name to ask; needed if several are served.")
def ask(question: str, name: str) -> None:
    """Ask a served model one question."""
    from openai import OpenAIError

    from forge.core.settings import load_settings
    from forge.serving.client import chat, client_of
    from forge.serving.targets import open_target

    settings = load_settings()
    desired, _ = open_target(settings).document.read()
    names = sorted(desired.serving.names)
    if not names:
        raise ForgeError("nothing is serving", fix="train a model first: forge run")
    if name not in names and (name or len(names) > 1):
        what = "is not served" if name else "is needed, since several names are served"
        raise ForgeError(what, where=f"--name {name}".strip(), fix=f"choose one of {', '.join(names)}")
    try:
        click.echo(chat(client_of(settings.endpoint), name or names[0], [{"role": "user", "content": question}]))
    except OpenAIError as error:
        raise ForgeError(
            f"did not answer ({error})",
            where=settings.endpoint,
            fix=f"start the server with forge start, or look at its logs in {settings.serving}",
        ) from None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the desired state and the reconciler's report as JSON.")
def status(as_json: bool) -> None:
    """Show what serves now, and what should."""
    from rich.console import Console

    from forge.core.settings import load_settings
    from forge.serving.targets import open_target

    settings = load_settings()
    target = open_target(settings)
    desired, _ = target.document.read()
    actual = target.status()
    if as_json:
        report = {
            "endpoint": settings.endpoint,
            "desired": desired.model_dump(mode="json"),
            "actual": actual.model_dump(mode="json") if actual else None,
        }
        click.echo(json.dumps(report, indent=2))
    elif desired.serving.base is None and desired.trial is None:
        click.echo("Nothing is serving. Train a model with: forge run")
    else:
        console = Console()
        console.print(names_table(desired, actual, settings.endpoint))
        for line in state_lines(desired, actual):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def names_table(desired: "Desired", actual: "Actual | None", endpoint: str) -> "Table":
    """The public names, with the version that each should point to and whether it does."""
    from rich.table import Table

    table = Table(title=endpoint, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("name", "version", "kind", "package", "serves"):
        table.add_column(column, no_wrap=True)
    base = desired.serving.base
    for name in sorted(desired.serving.names):
        served = desired.serving.find(name)
        if served is None:
            continue
        points = actual is not None and actual.names.get(name) == served.versioned
        table.add_row(
            name, served.version, "base" if served == base else "adapter", served.digest[:12], "yes" if points else "no"
        )
    return table


def state_lines(desired: "Desired", actual: "Actual | None") -> list[str]:
    """Generation, rollout, what is being waited for, and failures, a line each."""
    lines = []
    if desired.trial is not None:
        trial = desired.trial
        lines.append(f"rollout     {trial.of.name} version {trial.of.version} by {trial.owner}: {trial.state}")
    if actual is None:
        lines.append(f"generation  {desired.generation}")
        lines.append("reconciler  does not answer; start it with: forge start")
        return lines
    lines.append(f"generation  {actual.generation} of {desired.generation}")
    lines.append(f"waiting     {actual.waiting or 'no, all is as desired'}")
    lines += [f"failed      {version}: {reason}" for version, reason in sorted(actual.failed.items())]
    return lines


@click.command()
def start() -> None:
    """Serve again after `forge stop` or a reboot."""
    from forge.core.settings import load_settings
    from forge.serving.local_target import LocalTarget

    target = LocalTarget(local(load_settings()))
    desired, _ = target.document.read()
    if desired.serving.base is None:
        raise ForgeError("there is nothing to serve yet", fix="train a model first: forge run")
    target.ensure()
    click.echo(f"Starting {', '.join(sorted(desired.serving.names))}; progress: forge status, log: {target.log}")


@click.command()
def stop() -> None:
    """Stop serving on this machine. `forge start` resumes it."""
    from filelock import FileLock

    from forge.core.settings import load_settings
    from forge.serving.local_target import LocalTarget, reconciler_lock
    from forge.serving.vllm_process import LocalServer

    settings = local(load_settings())
    target = LocalTarget(settings)
    desired, _ = target.document.read()
    target.stop()
    with FileLock(reconciler_lock(settings), timeout=10):  # no reconciler may start vLLM meanwhile
        stopped = LocalServer(settings).stop()
    names = ", ".join(sorted(desired.serving.names))
    click.echo(f"Stopped {names or 'the server'}." if stopped else "Nothing is serving.")


@click.command()
@click.argument("name")
def remove(name: str) -> None:
    """Stop serving a public name. The registry keeps its versions."""
    from forge.core.settings import load_settings
    from forge.serving.desired import Conflict, Desired
    from forge.serving.plan import remove as without
    from forge.serving.targets import open_target
    from forge.serving.trial import Recovery
    from forge.storage import open_store

    settings = load_settings()
    target = open_target(settings)
    recovery = Recovery(lambda: open_store(settings), settings)
    while True:
        recovery(target.document)
        desired, revision = target.document.read()
        if name not in desired.serving.names:
            served = ", ".join(sorted(desired.serving.names)) or "nothing"
            raise ForgeError(f"{name} is not served", fix=f"served now: {served}")
        if desired.trial is not None:
            raise ForgeError(f"a rollout of {desired.trial.of.versioned} is under way", fix="wait until it has ended")
        changed = Desired(generation=desired.generation + 1, serving=without(desired.serving, name))
        try:
            target.document.write(changed, revision)
            break
        except Conflict:
            continue
    click.echo(f"{name} is no longer served.")


def local(settings: "Settings") -> "Settings":
    """The settings. ForgeError if a cluster serves, where Kubernetes starts and stops vLLM."""
    if settings.serving_target != "local":
        raise ForgeError(
            f"is {settings.serving_target}, and this command works on this machine alone",
            where="FORGE_SERVING_TARGET",
            fix="scale the cluster's Deployment vllm instead",
        )
    return settings
