"""`python -m tasks.register ui|fetch`: MLflow's UI on the embedded registry (what `make ui` runs), and a package."""

import os
import sys

import click

from forge.core.settings import load_settings
from forge.registry.mlflow_registry import artifact_root, open_registry, tracking_uri
from forge.registry.packages import fetch_package as fetch_package
from forge.storage import open_store


@click.group()
def cli() -> None:
    """The registry, by hand."""


@cli.command()
@click.option("--port", default=5000, show_default=True, help="Where the UI listens, on this machine only.")
def ui(port: int) -> None:
    """Serve MLflow's UI until interrupted."""
    settings = load_settings()
    if settings.mlflow_uri:
        raise click.ClickException(f"the registry is a server with a UI of its own: {settings.mlflow_uri}")
    open_registry(settings)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # its job runners are not needed, and outlive the UI
    click.echo(f"MLflow's UI starts, which takes up to a minute: http://127.0.0.1:{port} (Ctrl-C ends it)")
    where = ["--backend-store-uri", tracking_uri(settings), "--default-artifact-root", artifact_root(settings) or ""]
    listen = ["--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *listen, *where])  # noqa: S606


@cli.command()
@click.argument("model_uri")
def fetch(model_uri: str) -> None:
    """Print the local directory of a verified package: models:/NAME@champion, models:/NAME/3, or its own URI."""
    settings = load_settings()
    click.echo(fetch_package(model_uri, settings, open_store(settings)))


if __name__ == "__main__":
    cli()
