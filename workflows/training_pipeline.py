"""The main job, on one screen: from rows to a better model that serves, if it is better."""

from flytekit import conditional, workflow

from tasks.contracts import Base, Dataset, Evaluation, Model
from tasks.evaluate.task import evaluate_model
from tasks.finetune.task import train_on_1x1, train_on_1x2, train_on_2x2
from tasks.preflight.task import preflight
from tasks.preprocess.task import preprocess_data
from tasks.recipe import ModelRecipe, Recipe, TrainingRecipe
from tasks.register.task import register_model
from tasks.rollout.task import roll_out
from tasks.summary.task import hold_back, summarise, tell_failure


@workflow(on_failure=tell_failure)
def training_pipeline(data_path: str = "", recipe: str = "tiny-cpu") -> str:
    """Train a model on conversations, evaluate it, and, if the gate lets it, register it and serve it.

    Stages whose inputs have not changed are not run again. Nothing costly starts before preflight has found the
    recipe, the data, the store, MLflow and vLLM in order. A model that the gate holds back is no error: the champion
    goes on serving, and the result says why.

    Args:
        data_path: a JSONL file of chat messages, or a directory of them; without it, the recipe's own data
        recipe: the name of a shipped recipe, or the path of a YAML file

    Returns:
        the base URL of the OpenAI-compatible API that now serves the model, or why the gate held it back
    """
    plan = preflight(data_path=data_path, recipe=recipe).with_overrides(node_name="preflight")
    settled = plan.recipe
    dataset = preprocess_data(source=plan.source, data=settled.data, base=plan.base).with_overrides(
        node_name="preprocess"
    )
    model = train_model(
        shape=plan.shape, dataset=dataset, base=plan.base, model=settled.model, training=settled.training
    ).with_overrides(node_name="train")
    judged = evaluate_model(
        name=settled.name, dataset=dataset, model=model, evaluation=settled.evaluation, gate=settled.gate
    ).with_overrides(node_name="evaluate")
    return (
        conditional("gate")
        .if_(judged.passed.is_true())
        .then(release(recipe=settled, started=plan.started, dataset=dataset, model=model, evaluation=judged.evaluation))
        .else_()
        .then(
            hold_back(recipe=settled, started=plan.started, dataset=dataset, model=model, evaluation=judged.evaluation)
        )
    )


@workflow
def train_model(shape: str, dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe) -> Model:
    """Train in the recipe's shape, nodes x GPUs: another one needs another recipe, and no new registration."""
    return (
        conditional("shape")
        .if_(shape == "1x1")
        .then(train_on_1x1(dataset=dataset, base=base, model=model, training=training))
        .elif_(shape == "1x2")
        .then(train_on_1x2(dataset=dataset, base=base, model=model, training=training))
        .elif_(shape == "2x2")
        .then(train_on_2x2(dataset=dataset, base=base, model=model, training=training))
        .else_()
        .fail("no door of fine-tuning has the recipe's shape")
    )


@workflow
def release(recipe: Recipe, started: float, dataset: Dataset, model: Model, evaluation: Evaluation) -> str:
    """Register a model that has passed, and serve it; returns the API's base URL."""
    version = register_model(recipe=recipe, dataset=dataset, model=model, evaluation=evaluation)
    deployment = roll_out(version=version, evaluation=evaluation, serving=recipe.serving)
    return summarise(
        started=started,
        dataset=dataset,
        model=model,
        evaluation=evaluation,
        version=version,
        deployment=deployment,
    )
