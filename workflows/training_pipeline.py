"""The main workflow: from rows to a served model, if it is good enough."""

from flytekit import conditional, workflow

from forge.core.contracts import Base, Dataset, Evaluation, Model
from forge.core.recipe import ModelRecipe, Recipe, TrainingRecipe
from tasks.evaluate.task import current_champion, evaluate_model
from tasks.finetune.task import TRAIN_ON
from tasks.preflight.task import preflight
from tasks.preprocess.task import preprocess_data
from tasks.register.task import register_model
from tasks.rollout.task import roll_out
from tasks.summary.task import announce_challenger, announce_rejection, report_failure, summarise


@workflow(on_failure=report_failure)
def training_pipeline(data_path: str = "", recipe: str = "tiny-cpu") -> str:
    """Train a model on conversations, evaluate it, and, if it passes the gate, register and serve it.

    Stages whose inputs have not changed come from the cache. Preflight checks the recipe, data, store, MLflow and vLLM
    before anything costly starts. It is not an error if the gate rejects a model: the champion stays, and the result
    says why.

    Args:
        data_path: a JSONL file of chat messages, or a directory of such files; the default is the recipe's data
        recipe: the name of a shipped recipe, a path, an s3:// URI, or the YAML itself

    Returns:
        the base URL of the OpenAI-compatible API that now serves the model; or the version, if it was only registered;
        or why the gate rejected it
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
    # One conditional: run locally, flytekit would run both branches of one within a branch of another.
    return (
        conditional("gate")
        .if_(judged.passed.is_false())
        .then(
            announce_rejection(
                name=plan.name, started=plan.started, dataset=dataset, model=model, evaluation=evaluation
            )
        )
        .elif_(plan.rollout.is_true())
        .then(
            release(recipe=plan.recipe, started=plan.started, dataset=dataset, model=model, evaluation=evaluation)
        )
        .else_()
        .then(
            release_challenger(
                recipe=plan.recipe, started=plan.started, dataset=dataset, model=model, evaluation=evaluation
            )
        )
    )  # fmt: skip


@workflow
def train_model(shape: str, dataset: Dataset, base: Base, model: ModelRecipe, training: TrainingRecipe) -> Model:
    """Train in the recipe's shape (nodes x processes per node). A new shape in a recipe needs no new registration."""
    section = conditional("shape")
    for at, (name, train_on) in enumerate(TRAIN_ON.items()):
        case = section.elif_ if at else section.if_
        section = case(shape == name).then(train_on(dataset=dataset, base=base, model=model, training=training))
    return section.else_().fail("no task trains in the recipe's shape")


@workflow
def release(recipe: Recipe, started: float, dataset: Dataset, model: Model, evaluation: Evaluation) -> str:
    """Register a model that passed the gate, serve it, and return the API's base URL."""
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


@workflow
def release_challenger(recipe: Recipe, started: float, dataset: Dataset, model: Model, evaluation: Evaluation) -> str:
    """Register a model that passed the gate and is not to be rolled out; returns its version."""
    version = register_model(recipe=recipe, dataset=dataset, model=model, evaluation=evaluation)
    return announce_challenger(started=started, dataset=dataset, model=model, evaluation=evaluation, version=version)
