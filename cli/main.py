"""`forge`: run the pipeline, use what serves, look after the registry, and check recipes and this machine."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cli.doctor import doctor
from cli.pipeline import run
from cli.recipe_check import check_recipe
from cli.registry import fetch, history, lineage, prune, rollback, ui
from cli.serving import ask, remove, start, status, stop
from forge.core.environment import replace_unencodable
from forge.core.errors import ForgeError
from forge.core.full_disk import REASONS, DiskFull, explain_full_disk

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)  # of a file, whatever is done with it


class Commands(click.Group):
    """A group that lists its commands in the order in which they were added.

    What this machine lacks is reported in one message, without a traceback, whichever command meets it.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line."""
        replace_unencodable()
        try:
            with _output_errors():
                return super().main(*args, **kwargs)
        except ForgeError as error:
            error.show()
            sys.exit(error.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with _machine_errors(), _output_errors():
            result = super().invoke(ctx)
            sys.stdout.flush()
        return result


@contextlib.contextmanager
def _machine_errors() -> Iterator[None]:
    """Raise ForgeError if a disk is full, or if a file cannot be read or written."""
    try:
        with explain_full_disk(Path(os.environ.get("FORGE_HOME") or "."), "what the command writes"):
            yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise ForgeError(
            f"cannot be used ({error.strerror})",
            where=str(error.filename or ""),
            fix="check who may use it; what Forge writes is in FORGE_HOME",
        ) from None


@contextlib.contextmanager
def _output_errors() -> Iterator[None]:
    """Raise DiskFull if standard output goes to a file on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS or error.filename or _output_works():
            raise
        raise DiskFull("goes to a file whose disk is full", where="standard output", fix="free space there") from None


def _output_works() -> bool:
    """Whether standard output takes one more line. If not, what is still to be written is dropped."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="forge", message="%(package)s %(version)s")
def main() -> None:
    """Fine-tune language models, evaluate them, and serve them.

    FORGE_* environment variables say where things are kept; without any, that is .forge/ in the project.
    """


for command in (
    run, ask, status, start, stop, remove,
    history, lineage, fetch, rollback, prune, ui,
    check_recipe, doctor,
):  # fmt: skip
    main.add_command(command)

if __name__ == "__main__":
    main()
