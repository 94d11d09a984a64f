"""Errors that a user can fix: one message, without a traceback, that says what is wrong, where, and how to fix it."""

from collections.abc import Sequence

import click


class ForgeError(click.ClickException):
    """An error whose message is all that the user sees. The command line and `pyflyte run` exit with status 1.

    `where` is the file, URI, setting or recipe field that is wrong, and `fix` is what to do about it. The message is
    "where: what; fix", without the parts that are empty.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__((f"{where}: " if where else "") + what + (f"; {fix}" if fix else ""))

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self.what, self.where, self.fix)  # can be pickled, whatever the subclass


class Problems(ForgeError):
    """Several problems, reported together."""

    def __init__(self, title: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([title, *(f"  - {problem}" for problem in problems)]))


def _restored(what: str, where: str, fix: str) -> ForgeError:
    return ForgeError(what, where=where, fix=fix)


def printable(text: str) -> str:
    """A text with lone surrogates escaped, so that any file can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()
