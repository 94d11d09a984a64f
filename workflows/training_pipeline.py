"""The main job, on one screen: from rows to a better model that serves, if it is better."""

from flytekit import conditional, workflow

from forge.core.contracts import Base, Dataset, Evaluation, Model, Version
from forge.core.recipe import ModelRecipe, Recipe, TrainingRecipe
from tasks.evaluate.task import current_champion, evaluate_model
from tasks.finetune.task import train_on_1x1, train_on_1x2, train_on_2x2
from tasks.preflight.task import preflight
from tasks.preprocess.task import preprocess_data
from tasks.register.task import register_model
from tasks.rollout.task import roll_out
from tasks.summary.task import announce_challenger, hold_back, summarise, tell_failure


@workflow(on_failure=tell_failure)
def training_pipeline(data_path: str = "", recipe: str = "tiny-cpu") -> str:
    """Train a model on conversations, evaluate it, and, if the gate lets it, register it and serve it.

    Stages whose inputs have not changed are not run again. Nothing costly starts before preflight has found the
    recipe, the data, the store, MLflow and vLLM in order. A model that the gate refuses is no error: the champion goes
    on serving, and the result says why.

    Args:
        data_path: a JSONL file of chat messages, or a directory of them; without it, the recipe's own data
        recipe: the name of a shipped recipe, a path, an s3:// URI, or the YAML itself

    Returns:
        the base URL of the OpenAI-compatible API that now serves the model, the version where it was only registered,
        or why the gate refused it
    """
    plan = preflight(data_path=data_path, recipe=recipe).with_overrides(node_name="preflight")
    dataset = preprocess_data(source=plan.source, data=plan.data, base=plan.base).with_overrides(node_name="preprocess")
    model = train_model(
        shape=plan.shape, dataset=dataset, base=plan.base, model=plan.model, training=plan.training
    ).with_overrides(node_name="train")
    champion = current_champion(name=plan.name, model=model).with_overrides(node_name="champion")
    judged = evaluate_model(
        name=plan.name, dataset=dataset, model=model, champion=champion, evaluation=plan.evaluation, gate=plan.gate
    ).with_overrides(node_name="evaluate")
    evaluation = judged.evaluation
    return (
        conditional("gate")
        .if_(judged.passed.is_true())
        .then(
            release(
                recipe=plan.recipe, rollout=plan.rollout, started=plan.started, dataset=dataset, model=model,
                evaluation=evaluation,
            )
        )
        .else_()
        .then(hold_back(name=plan.name, started=plan.started, dataset=dataset, model=model, evaluation=evaluation))
    )  # fmt: skip


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
def release(
    recipe: Recipe, rollout: bool, started: float, dataset: Dataset, model: Model, evaluation: Evaluation
) -> str:
    """Register a model that has passed; where models are rolled out, serve it and return the API's base URL."""
    version = register_model(recipe=recipe, dataset=dataset, model=model, evaluation=evaluation)
    return (
        conditional("rollout")
        .if_(rollout.is_true())  # type: ignore[attr-defined]
        .then(
            serve(recipe=recipe, started=started, dataset=dataset, model=model, evaluation=evaluation, version=version)
        )
        .else_()
        .then(
            announce_challenger(started=started, dataset=dataset, model=model, evaluation=evaluation, version=version)
        )
    )


@workflow
def serve(
    recipe: Recipe, started: float, dataset: Dataset, model: Model, evaluation: Evaluation, version: Version
) -> str:
    """Serve a registered version, and return the API's base URL."""
    deployment = roll_out(version=version, evaluation=evaluation, serving=recipe.serving)
    return summarise(
        started=started,
        dataset=dataset,
        model=model,
        evaluation=evaluation,
        version=version,
        deployment=deployment,
    )
