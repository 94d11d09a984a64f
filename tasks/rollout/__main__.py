"""`python -m tasks.rollout ask|stop`: the local server, by hand (what `make ask` and `make stop` run)."""

import click
from openai import OpenAIError

from tasks.endpoint import ask as ask_once
from tasks.endpoint import client_of
from tasks.errors import ForgeError
from tasks.rollout.rollout import rollout_lock
from tasks.rollout.server import LocalServer
from tasks.settings import load_settings


@click.group()
def cli() -> None:
    """The model that serves on this machine."""


@cli.command()
@click.argument("question")
def ask(question: str) -> None:
    """Ask the served model one question."""
    settings = load_settings()
    running = LocalServer(settings).running()
    if running is None:
        raise ForgeError("nothing is serving; start it with: make run")
    try:
        messages = [{"role": "user", "content": question}]
        click.echo(ask_once(client_of(f"http://127.0.0.1:{running.spec.port}/v1"), running.spec.name, messages))
    except OpenAIError as error:
        raise ForgeError(f"the server did not answer ({error}); see {running.log}") from None


@cli.command()
def stop() -> None:
    """Stop the server."""
    settings = load_settings()
    with rollout_lock(settings, timeout=10):
        stopped = LocalServer(settings).stop()
    click.echo(f"Stopped {stopped.spec.name} version {stopped.spec.version}." if stopped else "Nothing is serving.")


if __name__ == "__main__":
    cli()
