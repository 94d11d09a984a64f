"""The scheduled drift check: is the champion still as good as when it was promoted?"""

from flytekit import workflow

from tasks.evaluate.task import check_champion
from tasks.preflight.task import preflight
from tasks.preprocess.task import preprocess_data


@workflow
def champion_check(data_path: str = "", recipe: str = "tiny-cpu") -> str:
    """Evaluate the champion on the current held-out prompts through its API; fails if it is worse, to notify.

    Args:
        data_path: the rows, as for training_pipeline; their held-out prompts are used
        recipe: the name of a shipped recipe, a path, an s3:// URI, or the YAML itself

    Returns:
        the champion's score now and at its promotion, in one line
    """
    plan = preflight(data_path=data_path, recipe=recipe)
    dataset = preprocess_data(source=plan.source, data=plan.data, base=plan.base)
    return check_champion(name=plan.name, dataset=dataset, evaluation=plan.evaluation, gate=plan.gate)
