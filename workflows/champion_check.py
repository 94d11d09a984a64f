"""The nightly look at what serves: is the champion as good as when it was promoted?"""

from flytekit import workflow

from tasks.evaluate.task import check_champion
from tasks.preflight.task import preflight
from tasks.preprocess.task import preprocess_data


@workflow
def champion_check(data_path: str = "", recipe: str = "tiny-cpu") -> str:
    """Ask the champion the current held-out prompts through its API; fails where it has fallen, so that people hear.

    Args:
        data_path: the rows, as training_pipeline takes them; those held out of them are asked
        recipe: the name of a shipped recipe, a path, an s3:// URI, or the YAML itself

    Returns:
        the champion's score now and when it was promoted, in one line
    """
    plan = preflight(data_path=data_path, recipe=recipe)
    dataset = preprocess_data(source=plan.source, data=plan.data, base=plan.base)
    return check_champion(name=plan.name, dataset=dataset, evaluation=plan.evaluation, gate=plan.gate)
