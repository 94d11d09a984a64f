"""The way back, by hand: an earlier version serves again."""

from flytekit import workflow

from forge.core.contracts import Deployment
from tasks.rollout.task import roll_back


@workflow
def rollback(name: str, to: str = "") -> Deployment:
    """Serve an earlier version again: proved over its API as any rollout, and then the champion.

    Args:
        name: the registered and served model's name
        to: the number of a version; without it, the champion before the present one

    Returns:
        what serves now, and since which change
    """
    return roll_back(name=name, to=to)
