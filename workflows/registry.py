"""The registry, by hand or by schedule: what there is, what it was made from, and what may go."""

from flytekit import workflow

from tasks.register.task import apply_retention, show_history, show_lineage


@workflow
def history(name: str) -> list[str]:
    """Print the versions of a model: digest, data set, score, verdict, alias, and when each served.

    Args:
        name: the registered model's name, as its recipe gives it

    Returns:
        the versions' numbers, the newest first
    """
    return show_history(name=name)


@workflow
def lineage(name: str, version: str = "") -> str:
    """Print what a model was made from: package, evaluation, data set, base, recipe, who trained it and with what.

    Args:
        name: the registered model's name
        version: the number of a version; without it, the champion

    Returns:
        the URI of its package
    """
    return show_lineage(name=name, version=version)


@workflow
def retention(name: str = "", keep: int = 10, days: float = 30.0, apply: bool = False) -> list[str]:
    """Print which old versions and packages without a version may go, and, with --apply, remove them.

    Versions with an alias and the champion before the present one always stay.

    Args:
        name: the registered model's name; without it, all models
        keep: how many of the last versions stay
        days: what is younger than so many days stays
        apply: remove them; without it, nothing is changed

    Returns:
        the URIs of the packages that went, or would go
    """
    return apply_retention(name=name, keep=keep, days=days, apply=apply)
