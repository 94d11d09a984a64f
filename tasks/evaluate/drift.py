"""Whether the champion still answers as well as when it was promoted, asked through the API that serves it."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from openai import OpenAIError

from forge.core.contracts import Dataset
from forge.core.errors import ForgeError
from forge.core.recipe import EvaluationRecipe, GateRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import find_champion, open_registry
from forge.serving.client import chat, client_of
from forge.storage import Store
from tasks.evaluate.items import Item, digest_items, read_items
from tasks.evaluate.record import record
from tasks.evaluate.score import judge
from tasks.evaluate.statistics import score_interval

log = logging.getLogger(__name__)

AT_ONCE = 16  # requests
ITEMS = "forge.items"  # the tag with the digest of what was asked


def check_drift(
    name: str,
    dataset: Dataset,
    recipe: EvaluationRecipe,
    gate: GateRecipe,
    store: Store,
    settings: Settings,
) -> str:
    """Ask the champion the held-out prompts; returns one line of figures, which MLflow gets too.

    Raises ForgeError where its score is below that of its promotion by more than the gate's margin, at 95 %, or where
    there is no champion, nothing to ask, or no answer.
    """
    client = open_registry(settings)
    champion = find_champion(client, name)
    if champion is None:
        raise ForgeError(f"champion_check: {name} has no champion yet; run training_pipeline first")
    figures = client.get_run(champion.run_id).data.metrics if champion.run_id else {}
    if "score" not in figures:
        raise ForgeError(f"champion_check: {name} version {champion.version} has no score from its promotion in MLflow")
    promoted = float(figures["score"])
    items, _ = read_items(store.path(dataset.uri) / "heldout.jsonl", recipe.items, recipe.check)
    if not items:
        raise ForgeError(f"champion_check: the data set {dataset.uri} has no held-out conversation to ask")
    started = time.monotonic()
    answers = ask_server(settings.endpoint, name, items, recipe.max_new_tokens)
    seconds = time.monotonic() - started
    score = np.array([judge(item.check, item.expected, text) for item, text in zip(items, answers, strict=True)])
    found = score_interval(score)
    fallen = found.high < promoted - gate.non_inferiority_margin
    says = (
        f"{name} version {champion.version} scores {found.estimate:.1%} on {len(items)} held-out prompts (95% bounds "
        f"{found.low:.1%} to {found.high:.1%}), {promoted:.1%} when it was promoted"
    )
    tags = {"model": name, "version": champion.version, ITEMS: digest_items(items), "fallen": str(fallen).lower()}
    shown = {"score": found.estimate, "score_promoted": promoted, "drift": found.estimate - promoted,
             "items": float(len(items)), "seconds": seconds}  # fmt: skip
    record(client, settings, f"champion-check {name}", tags, shown)
    if fallen:
        raise ForgeError(
            f"champion_check: {says}: it fell by more than gate.non_inferiority_margin, "
            f"{gate.non_inferiority_margin:.1%}; train on newer rows, "
            "or see whether the server serves the champion"
        )
    log.info(f"{says}")
    return says


def ask_server(endpoint: str, name: str, items: Sequence[Item], max_new_tokens: int) -> list[str]:
    """The greedy answers of a served model, several requests at once."""
    client = client_of(endpoint)
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda item: chat(client, name, item.messages, item.tools, max_new_tokens), items))
    except OpenAIError as error:
        raise ForgeError(
            f"champion_check: the server at {endpoint} did not answer ({error}); start it: make run"
        ) from None
