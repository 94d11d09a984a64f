"""`forge run`: the whole pipeline on this machine."""

import logging
import os

import click

from forge.core.errors import ForgeError


@click.command()
@click.option(
    "--data-path", "--data_path", default="", metavar="PATH",
    help="A file or directory of rows, or an s3:// or hf:// URI. Default: the recipe's own data.",
)  # fmt: skip
@click.option(
    "--recipe", default="tiny-cpu", show_default=True,
    help="A shipped recipe's name, a path, an s3:// URI, or the YAML itself.",
)  # fmt: skip
@click.option("--overwrite-cache", is_flag=True, help="Run every stage again, even if its inputs have not changed.")
def run(data_path: str, recipe: str, overwrite_cache: bool) -> None:
    """Preprocess, train, evaluate, register and serve a model.

    Stages whose inputs have not changed are not run again, and an interrupted run resumes. Prints the URL of the API
    that serves the model, or why the gate rejected it.
    """
    from forge.core.settings import NO_TEXT, is_text, load_settings
    from forge.core.signals import keep_interrupts

    keep_interrupts()
    load_settings()  # before Flyte is imported, which looks for its files in the user's home
    for option, text in {"--data-path": data_path, "--recipe": recipe}.items():
        if not is_text(text):
            raise ForgeError(NO_TEXT, where=f"{option} {text}")
    from flytekit.loggers import logger

    from workflows.training_pipeline import training_pipeline

    logger.setLevel(logging.CRITICAL)  # as `pyflyte run` does: an error is reported once, by the command
    if overwrite_cache:
        os.environ["FLYTE_LOCAL_CACHE_OVERWRITE"] = "true"
    click.echo(training_pipeline(data_path=data_path, recipe=recipe))
