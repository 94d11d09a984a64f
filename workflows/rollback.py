"""Roll back to an earlier version, by hand."""

from flytekit import workflow

from forge.core.contracts import Deployment
from tasks.rollout.task import roll_back


@workflow
def rollback(name: str, to: str = "") -> Deployment:
    """Serve an earlier version again. It is tested through its API like any rollout, then becomes the champion.

    Args:
        name: the registered and served model's name
        to: a version number; the default is the previous champion

    Returns:
        the deployment that serves now
    """
    return roll_back(name=name, to=to)
