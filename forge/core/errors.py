"""Errors that a user can mend: one message that names the thing, where it is, and the mend."""

from collections.abc import Sequence

import click


class ForgeError(click.ClickException):
    """Shown as its message alone, without a traceback, by the command line and by `pyflyte run`; exit status 1."""


class Problems(ForgeError):
    """Several findings reported at once."""

    def __init__(self, title: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([title, *(f"  - {problem}" for problem in problems)]))

    def __reduce__(self) -> tuple[type[ForgeError], tuple[str]]:
        return ForgeError, (self.message,)  # crosses process boundaries as its text
