"""The main job, on one screen: from rows to a better model that serves."""

from flytekit import workflow

from tasks.evaluate.task import evaluate_model
from tasks.finetune.task import train_model
from tasks.preflight.task import preflight
from tasks.preprocess.task import preprocess_data
from tasks.register.task import register_model
from tasks.rollout.task import roll_out
from tasks.summary.task import summarise


@workflow
def training_pipeline(data_path: str = "", recipe: str = "tiny-cpu") -> str:
    """Train a model on conversations, evaluate it, register it and serve it; returns the API's address.

    Stages whose inputs have not changed are not run again. Nothing costly starts before preflight has found the
    recipe, the data, the store, MLflow and vLLM in order.

    Args:
        data_path: a JSONL file of chat messages, or a directory of them; without it, the recipe's own data
        recipe: the name of a shipped recipe, or the path of a YAML file

    Returns:
        the base URL of the OpenAI-compatible API that now serves the model
    """
    plan = preflight(data_path=data_path, recipe=recipe)
    settled = plan.recipe
    dataset = preprocess_data(source=plan.source, data=settled.data, base=plan.base)
    model = train_model(dataset=dataset, base=plan.base, model=settled.model, training=settled.training)
    evaluation = evaluate_model(dataset=dataset, model=model, evaluation=settled.evaluation)
    version = register_model(recipe=settled, dataset=dataset, model=model, evaluation=evaluation)
    deployment = roll_out(version=version, evaluation=evaluation, serving=settled.serving)
    return summarise(
        started=plan.started,
        dataset=dataset,
        model=model,
        evaluation=evaluation,
        version=version,
        deployment=deployment,
    )
