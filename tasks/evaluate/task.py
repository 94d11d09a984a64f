"""The Flyte tasks of evaluation."""

from typing import Annotated, NamedTuple

from flytekit import Cache, Deck, HashMethod, task

from forge.cluster.nodes import TrainingShape
from forge.core.code_version import code_version
from forge.core.contracts import Champion, Dataset, Evaluation, Model, cache_key, value_key
from forge.core.logs import start_logging
from forge.core.recipe import EvaluationRecipe, GateRecipe
from forge.core.settings import load_settings
from forge.storage import open_store
from tasks.task_pods import light, on_gpus


class GatedEvaluation(NamedTuple):
    """An evaluation, and whether the model passed the gate."""

    evaluation: Annotated[Evaluation, HashMethod(cache_key)]
    passed: bool


@task(**light())
def current_champion(name: str, model: Model) -> Annotated[Champion, HashMethod(value_key)]:
    """The champion to compare a model with. It is looked up after training, and not cached, since it may change."""
    from tasks.evaluate.champion import champion_to_compare

    start_logging("evaluate")
    settings = load_settings()
    return champion_to_compare(name, model, open_store(settings), settings)


@task(
    enable_deck=True,
    deck_fields=(),  # only the report: Flyte's own decks need pip, which the images lack
    cache=Cache(version=code_version("tasks.evaluate"), serialize=True),
    **on_gpus(TrainingShape(1, 2), hours=6),
)
def evaluate_model(
    name: str, dataset: Dataset, model: Model, champion: Champion, evaluation: EvaluationRecipe, gate: GateRecipe
) -> GatedEvaluation:
    """Compare a model with its base and with the champion. The report is also the task's Flyte deck."""
    from tasks.evaluate.evaluate import evaluate

    start_logging("evaluate")
    settings = load_settings()
    store = open_store(settings)
    result = evaluate(name, dataset, model, champion, evaluation, gate, store, settings)
    Deck("Evaluation", store.path(result.report).read_text(encoding="utf-8"))
    return GatedEvaluation(result, result.verdict == "passed")


@task(**light(hours=2))
def check_champion(name: str, dataset: Dataset, evaluation: EvaluationRecipe, gate: GateRecipe) -> str:
    """Score the served champion on the held-out prompts; fails if it has become worse since its promotion."""
    from tasks.evaluate.drift import check_drift

    start_logging("champion_check")
    settings = load_settings()
    return check_drift(name, dataset, evaluation, gate, open_store(settings), settings)
