"""The door of evaluation. Not cached by Flyte: the champion may change; answers are kept by what gave them."""

from pathlib import Path
from typing import NamedTuple

from flytekit import Deck, task

from tasks.contracts import Dataset, Evaluation, Model
from tasks.nodes import Shape
from tasks.pods import light, on_gpus
from tasks.recipe import EvaluationRecipe, GateRecipe
from tasks.settings import load_settings
from tasks.storage import open_store


class Judged(NamedTuple):
    """An evaluation, and whether the gate lets the model on."""

    evaluation: Evaluation
    passed: bool


@task(enable_deck=True, **on_gpus(Shape(1, 2), hours=6))
def evaluate_model(name: str, dataset: Dataset, model: Model, evaluation: EvaluationRecipe, gate: GateRecipe) -> Judged:
    """Compare a model with what it was trained from and with the champion; the report is also the task's deck."""
    from tasks.evaluate.evaluate import evaluate

    settings = load_settings()
    result = evaluate(name, dataset, model, evaluation, gate, open_store(settings), settings)
    Deck("Evaluation", Path(result.report).read_text(encoding="utf-8"))
    return Judged(result, result.verdict == "pass")


@task(**light(hours=2))
def check_champion(name: str, dataset: Dataset, evaluation: EvaluationRecipe, gate: GateRecipe) -> str:
    """Ask the champion the current held-out prompts over its API; fails where it is worse than when it was promoted."""
    from tasks.evaluate.drift import check_drift

    settings = load_settings()
    return check_drift(name, dataset, evaluation, gate, open_store(settings), settings)
