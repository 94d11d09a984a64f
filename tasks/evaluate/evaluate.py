"""Candidate, base and champion answer the same held-out items, and the gate decides on the candidate."""

import functools
import logging
import time
from collections.abc import Mapping

from rich.progress import Progress, TaskID

from forge.cluster.gpus import check_gpus_seen
from forge.core.contracts import Champion, Dataset, Evaluation, Model
from forge.core.digest import digest_directory
from forge.core.errors import ForgeError
from forge.core.recipe import EvaluationRecipe, GateRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import MODEL_DIGEST
from forge.registry.packages import LocalBase, is_registered, local_base
from forge.storage import Store
from forge.storage.completed import find_completed, record_completed
from tasks.evaluate.answer_cache import cached_answers, choose_engine
from tasks.evaluate.champion import champion_model
from tasks.evaluate.evaluation_files import (
    REPORT,
    EvaluationRequest,
    EvaluationResults,
    finite_or_none,
    publish_evaluation,
    read_card,
)
from tasks.evaluate.gate import Reference, decide
from tasks.evaluate.items import Item, read_items
from tasks.evaluate.record import record_evaluation
from tasks.evaluate.score import Judged, indices_by_slice, judge_all, summarise

log = logging.getLogger(__name__)

STAGE = "evaluate"


def evaluate(
    name: str,
    dataset: Dataset,
    model: Model,
    champion: Champion,
    recipe: EvaluationRecipe,
    gate: GateRecipe,
    store: Store,
    settings: Settings,
) -> Evaluation:
    """Compare a trained model with its base and with the champion of `name`; publish the results.

    The published directory holds every model's answers and scores (items.parquet), the report, and the verdict with
    all figures (evaluation.json). MLflow gets the metrics and the report. If the same evaluation was published before,
    it is returned.

    Raises ForgeError if nothing is held out, a model cannot be loaded, the champion's package is missing or damaged,
    or requested GPUs are not there.
    """
    started = time.time()
    check_gpus_seen(settings.gpus)
    engine = choose_engine(recipe, settings)
    inputs = [name, dataset.digest, model.digest, champion.model_dump(), recipe.model_dump(mode="json"),
              gate.model_dump(mode="json"), engine]  # fmt: skip
    evaluation = find_completed(store, STAGE, inputs, Evaluation)
    if evaluation is None:
        request = EvaluationRequest(name, dataset, model, champion, recipe, gate)
        results = compare_models(request, engine, store, settings)
        uri, digest = publish_evaluation(request, results, store)
        evaluation = summary_of(request, results, uri, digest, started, store)
        record_completed(store, STAGE, inputs, evaluation)
    log_to_mlflow(evaluation, name, store, settings)
    log.info(evaluation.reason)
    return evaluation


def compare_models(request: EvaluationRequest, engine: str, store: Store, settings: Settings) -> EvaluationResults:
    """Let all models answer the items, score the answers, and decide on the candidate."""
    items, skipped = held_out_items(request, store)
    directory = store.path(request.model.uri) / "model"
    candidate, model_digest = LocalBase(str(directory)), digest_directory(directory)[0]
    models = {"candidate": (candidate, model_digest), **reference_models(request, model_digest, store, settings)}
    judged = {}
    for who, (local, digest) in models.items():
        with Progress() as progress:
            bar = progress.add_task(f"evaluate the {who}", total=len(items))
            show = functools.partial(_show, progress, bar)
            answers = cached_answers(local, digest, items, request.recipe, store, settings, engine, show)
        judged[who] = judge_all(items, answers)
    reference = reference_for_gate(request.champion, judged)
    slices = indices_by_slice(items)
    return EvaluationResults(
        candidate=candidate,
        model_digest=model_digest,
        engine=engine,
        items=items,
        skipped=skipped,
        judged=judged,
        scores={who: summarise(items, answers) for who, answers in judged.items()},
        slices=slices,
        reference="" if reference is None else reference.name,
        verdict=decide(judged["candidate"], reference, slices, request.gate),
        harness=harness_scores(request, store, settings),
    )


def _show(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def held_out_items(request: EvaluationRequest, store: Store) -> tuple[list[Item], int]:
    """The held-out items, and the number of rows skipped; ForgeError if there are no items."""
    heldout = store.path(request.dataset.uri) / "heldout.jsonl"
    items, skipped = read_items(heldout, request.recipe.items, request.recipe.check)
    if not items:
        raise ForgeError(
            f"the data set {request.dataset.uri} has no held-out conversation with an answer that can be scored "
            f"({skipped} rows skipped)",
            where="evaluation",
            fix="raise data.heldout_fraction, or give data.heldout_source",
        )
    return items, skipped


def reference_models(
    request: EvaluationRequest, candidate: str, store: Store, settings: Settings
) -> dict[str, tuple[LocalBase, str]]:
    """The base, and the champion if there is one that is not the candidate; each with its digest."""
    models = {"base": evaluated_base(request.model, settings, store)}
    if request.champion.version:
        champion = champion_model(request.name, request.champion, candidate, store, settings)
        if champion is not None:
            models["champion"] = champion
    return models


def evaluated_base(model: Model, settings: Settings, store: Store) -> tuple[LocalBase, str]:
    """The base that a model was trained from, and its digest."""
    base = model.base
    if not base.revision:  # the random initial weights, in the store
        path = store.path(base.location)
        return LocalBase(str(path)), digest_directory(path)[0]
    local, digest = local_base(base, settings, store), base.revision
    if is_registered(base.location):  # the digest of its own evaluation, whose answers may be cached
        digest = str(store.manifest(base.location).get("model_digest", digest))
    return local, digest


def reference_for_gate(champion: Champion, judged: Mapping[str, Judged]) -> Reference | None:
    """What the gate compares the candidate with; None if the candidate is the champion."""
    if not champion.version:
        return Reference("base", judged["base"])
    return Reference("champion", judged["champion"]) if "champion" in judged else None


def harness_scores(request: EvaluationRequest, store: Store, settings: Settings) -> dict[str, float]:
    """The candidate's scores on the recipe's lm-evaluation-harness tasks."""
    if not request.recipe.harness_tasks:
        return {}
    from tasks.evaluate.harness import run_harness

    directory = store.path(request.model.uri) / "model"
    return run_harness(directory, request.recipe.harness_tasks, settings, request.recipe.batch_size)


def summary_of(
    request: EvaluationRequest, results: EvaluationResults, uri: str, digest: str, started: float, store: Store
) -> Evaluation:
    """The published evaluation, as later stages get it."""
    candidate, base, champion = results.scores["candidate"], results.scores["base"], results.scores.get("champion")
    return Evaluation(
        uri=uri,
        digest=digest,
        store=store.identity,
        started=started,
        seconds=time.time() - started,
        items=len(results.items),
        score=candidate.score,
        score_base=base.score,
        score_champion=None if champion is None else champion.score,
        exact_match=candidate.exact_match,
        nll=finite_or_none(candidate.nll),
        nll_base=finite_or_none(base.nll),
        json_validity=candidate.json_validity,
        champion=request.champion.version,
        verdict=results.verdict.outcome,
        reason=results.verdict.reason,
        report=f"{uri}/{REPORT}",
    )


def log_to_mlflow(evaluation: Evaluation, name: str, store: Store, settings: Settings) -> None:
    """Record a published evaluation in MLflow, unless an earlier attempt did."""
    card = read_card(evaluation, store)
    tags = {"dataset": card["dataset"]["digest"], MODEL_DIGEST: card["model"]["model_digest"]}
    record_evaluation(settings, name, evaluation, tags, card["harness"], store.path(evaluation.report))
