"""The door of evaluation."""

from pathlib import Path
from typing import Annotated

from flytekit import Cache, Deck, HashMethod, task

from tasks.contracts import Dataset, Evaluation, Model, cache_key
from tasks.recipe import EvaluationRecipe
from tasks.settings import load_settings
from tasks.storage import open_store
from tasks.version import code_version


@task(cache=Cache(version=code_version("evaluate"), serialize=True), enable_deck=True)
def evaluate_model(
    dataset: Dataset, model: Model, evaluation: EvaluationRecipe
) -> Annotated[Evaluation, HashMethod(cache_key)]:
    """Score a model, and what it was trained from, on held-out rows; the report is also the task's deck."""
    from tasks.evaluate.evaluate import evaluate

    result = evaluate(dataset, model, evaluation, open_store(load_settings()))
    Deck("Evaluation", Path(result.report).read_text(encoding="utf-8"))
    return result
