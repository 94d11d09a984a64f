"""Model registry workflows: history, lineage, and retention."""

from flytekit import workflow

from tasks.register.task import prune_registry, show_history, show_lineage


@workflow
def history(name: str) -> list[str]:
    """Print the versions of a model: digest, data set, score, verdict, alias, and when each was served.

    Args:
        name: the registered model's name, as in its recipe

    Returns:
        the version numbers, newest first
    """
    return show_history(name=name)


@workflow
def lineage(name: str, version: str = "") -> str:
    """Print the lineage of a model: package, evaluation, data set, base, recipe, and who trained it with which code.

    Args:
        name: the registered model's name
        version: a version number; the default is the champion

    Returns:
        the URI of the model's package
    """
    return show_lineage(name=name, version=version)


@workflow
def retention(name: str = "", keep: int = 10, days: float = 30.0, apply: bool = False) -> list[str]:
    """Print which old versions, and packages without a version, can be pruned; with --apply, prune them.

    Versions with an alias and the previous champion are always kept.

    Args:
        name: the registered model's name; the default is all models
        keep: number of latest versions to keep
        days: keep everything younger than this many days
        apply: prune; without it, nothing is changed

    Returns:
        the URIs of the packages that were pruned, or would be
    """
    return prune_registry(name=name, keep=keep, days=days, apply=apply)
