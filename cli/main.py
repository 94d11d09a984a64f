"""`forge`: run the pipeline, use what serves, look after the registry, and check recipes and this machine."""

import click

from cli.doctor import doctor
from cli.pipeline import run
from cli.recipe_check import check_recipe
from cli.registry import fetch, history, lineage, prune, rollback, ui
from cli.serving import ask, remove, start, status, stop


class InOrder(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names."""
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"]})
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
