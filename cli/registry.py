"""`forge history|lineage|fetch|rollback|prune|ui`: the registered models."""

import os
import sys

import click

from forge.core.errors import ForgeError


@click.command()
@click.argument("name")
def history(name: str) -> None:
    """List a model's versions, newest first, and when each served."""
    from rich.console import Console

    from forge.core.settings import load_settings
    from forge.storage import open_store
    from tasks.register import history as past

    settings = load_settings()
    Console().print(past.history_table(name, past.history(name, settings, open_store(settings))))


@click.command()
@click.argument("model_uri")
def lineage(model_uri: str) -> None:
    """Show what a model was made from.

    MODEL_URI is models:/NAME@champion or models:/NAME/3.
    """
    from rich.console import Console

    from forge.core.settings import load_settings
    from forge.storage import open_store
    from tasks.register import history as past

    settings = load_settings()
    Console().print(past.lineage_tree(past.lineage(model_uri, settings, open_store(settings))))


@click.command()
@click.argument("model_uri")
def fetch(model_uri: str) -> None:
    """Fetch and verify a package, and print its local directory.

    MODEL_URI is models:/NAME@champion, models:/NAME/3, or the package's own URI.
    """
    from forge.core.settings import load_settings
    from forge.registry.packages import fetch_package
    from forge.storage import open_store

    settings = load_settings()
    click.echo(fetch_package(model_uri, settings, open_store(settings)))


@click.command()
@click.argument("name")
@click.option("--to", default="", metavar="N", help="The version to serve. Default: the previous champion.")
def rollback(name: str, to: str) -> None:
    """Serve an earlier version again, and make it the champion.

    It is proved over its API first, as in any rollout.
    """
    from rich.console import Console

    from forge.core.logs import start_logging
    from forge.core.settings import load_settings
    from forge.storage import open_store
    from tasks.rollout.rollback import roll_back
    from tasks.rollout.rollout_report import table

    start_logging("rollback")
    settings = load_settings()
    deployment = roll_back(name, to, None, settings, open_store(settings))
    Console().print(table(deployment))


@click.command()
@click.argument("name", default="")
@click.option("--keep", default=10, show_default=True, type=click.IntRange(min=0), help="Last versions to keep.")
@click.option(
    "--days", default=30.0, show_default=True, type=click.FloatRange(min=0), help="Keep whatever is younger than this."
)
@click.option("--apply", is_flag=True, help="Remove them. Without it, nothing is changed.")
def prune(name: str, keep: int, days: float, apply: bool) -> None:
    """List old versions and packages that can be pruned, of NAME or of all models.

    Versions with an alias, and the champion before the present one, are always kept.
    """
    from rich.console import Console

    from forge.core.logs import start_logging
    from forge.core.settings import load_settings
    from forge.storage import open_store
    from tasks.register import pruning

    start_logging("prune")
    settings = load_settings()
    removals = pruning.prune(name, keep, days, apply, settings, open_store(settings))
    Console().print(pruning.pruning_table(removals, apply))


@click.command()
@click.option("--port", default=5000, show_default=True, help="Port of the UI, on this machine only.")
def ui(port: int) -> None:
    """Serve MLflow's UI on the embedded registry until interrupted."""
    from forge.core.settings import load_settings
    from forge.registry.mlflow_registry import artifact_root, open_registry, tracking_uri

    settings = load_settings()
    if settings.mlflow_uri:
        raise ForgeError(
            "is a server with a UI of its own", where="FORGE_MLFLOW_URI", fix=f"open {settings.mlflow_uri}"
        )
    open_registry(settings)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # its job runners are not needed, and outlive the UI
    click.echo(f"MLflow's UI takes up to a minute to start: http://127.0.0.1:{port} (Ctrl-C stops it)")
    where = ["--backend-store-uri", tracking_uri(settings), "--default-artifact-root", artifact_root(settings) or ""]
    listen = ["--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *listen, *where])  # noqa: S606
