"""Whether the champion still scores as well as when it was promoted, measured through the API that serves it."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from openai import OpenAIError

from forge.core.contracts import Champion, Dataset
from forge.core.errors import ForgeError
from forge.core.recipe import EvaluationRecipe, GateRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import find_champion, open_registry
from forge.registry.mlflow_runs import SCORE
from forge.serving.client import chat, client_of
from forge.storage import Store
from tasks.evaluate.items import Item, digest_items, read_items
from tasks.evaluate.record import record
from tasks.evaluate.score import judge
from tasks.evaluate.statistics import Interval, score_interval

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

WHERE = "champion_check"
REQUESTS = 16  # in parallel
ITEMS = "forge.items"  # tag with the digest of the items


def check_drift(
    name: str,
    dataset: Dataset,
    recipe: EvaluationRecipe,
    gate: GateRecipe,
    store: Store,
    settings: Settings,
) -> str:
    """Score the served champion on the held-out prompts; returns the result as one line, and logs it to MLflow.

    Raises ForgeError if, at 95 % confidence, the score is below the one at its promotion by more than the
    non-inferiority margin; also if there is no champion, no item, or no answer.
    """
    client = open_registry(settings)
    champion, promoted = promoted_champion(client, name)
    items, _ = read_items(store.path(dataset.uri) / "heldout.jsonl", recipe.items, recipe.check)
    if not items:
        raise ForgeError(f"the data set {dataset.uri} has no held-out conversation to answer", where=WHERE)
    score, seconds = score_served(settings.endpoint, name, items, recipe.max_new_tokens)
    fallen = score.high < promoted - gate.non_inferiority_margin
    tags = {"model": name, "version": champion.version, ITEMS: digest_items(items), "fallen": str(fallen).lower()}
    metrics = {SCORE: score.estimate, "score_promoted": promoted, "drift": score.estimate - promoted,
               "items": float(len(items)), "seconds": seconds}  # fmt: skip
    record(client, settings, f"champion-check {name}", tags, metrics)
    result = (
        f"{name} version {champion.version} scores {score.estimate:.1%} on {len(items)} held-out prompts (95% bounds "
        f"{score.low:.1%} to {score.high:.1%}), against {promoted:.1%} when it was promoted"
    )
    if fallen:
        raise ForgeError(
            f"{result}: it fell by more than gate.non_inferiority_margin, {gate.non_inferiority_margin:.1%}",
            where=WHERE,
            fix="train on newer rows, or check whether the server serves the champion",
        )
    log.info(result)
    return result


def promoted_champion(client: "MlflowClient", name: str) -> tuple[Champion, float]:
    """The champion, and its score when it was promoted."""
    champion = find_champion(client, name)
    if champion is None:
        raise ForgeError(f"{name} has no champion yet", where=WHERE, fix="run training_pipeline first")
    metrics = client.get_run(champion.run_id).data.metrics if champion.run_id else {}
    if SCORE not in metrics:
        raise ForgeError(f"{name} version {champion.version} has no score in MLflow from its promotion", where=WHERE)
    return champion, float(metrics[SCORE])


def score_served(endpoint: str, name: str, items: Sequence[Item], max_new_tokens: int) -> tuple[Interval, float]:
    """The mean score of a served model with its bounds, and the seconds that all answers took."""
    started = time.monotonic()
    answers = ask_server(endpoint, name, items, max_new_tokens)
    seconds = time.monotonic() - started
    scores = [judge(item.check, item.expected, text) for item, text in zip(items, answers, strict=True)]
    return score_interval(np.array(scores)), seconds


def ask_server(endpoint: str, name: str, items: Sequence[Item], max_new_tokens: int) -> list[str]:
    """The greedy answers of a served model, with several requests in parallel."""
    client = client_of(endpoint)
    try:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(lambda item: chat(client, name, item.messages, item.tools, max_new_tokens), items))
    except OpenAIError as error:
        where = f"{WHERE}: the server at {endpoint}"
        raise ForgeError(f"did not answer ({error})", where=where, fix="start it with make run") from None
