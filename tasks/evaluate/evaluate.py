"""The stage's work: candidate, base and champion answer the same items; the gate decides, and the report says why."""

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from rich.progress import Progress

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
from tasks.evaluate.answer_cache import answers_of, chosen_engine
from tasks.evaluate.ask import ask_all, tells_date
from tasks.evaluate.champion import champion_model
from tasks.evaluate.evaluation_report import Page, render_evaluation_report
from tasks.evaluate.gate import Reference, decide
from tasks.evaluate.items import Item, digest_items, read_items
from tasks.evaluate.record import record_evaluation
from tasks.evaluate.score import Judged, judge_all, places_by_slice, speed_of, summarise

log = logging.getLogger(__name__)

STAGE = "evaluate"
CARD, REPORT, ITEMS = "evaluation.json", "report.html", "items.parquet"


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
    """Compare a trained model with what it was trained from and with the champion of `name`; publish all of it.

    The result is a directory: `items.parquet` (each prompt with the expected answer, and every model's answer, score
    and NLL), `report.html`, and the card `evaluation.json` (figures, verdict). It is logged to MLflow too. One that
    was published before from the same is found, and not made again.

    Raises ForgeError where nothing is held out, a model cannot be loaded, the champion's package is gone or damaged, or
    GPUs that were asked for are not there.
    """
    started = time.time()
    check_gpus_seen(settings.gpus)
    engine = chosen_engine(recipe, settings)
    asked = [name, dataset.digest, model.digest, champion.model_dump(), recipe.model_dump(mode="json"),
             gate.model_dump(mode="json"), engine]  # fmt: skip
    if found := find_completed(store, STAGE, asked, Evaluation):
        return recorded(found, name, store, settings)
    directory = store.path(model.uri)
    items, passed_over = read_items(store.path(dataset.uri) / "heldout.jsonl", recipe.items, recipe.check)
    if not items:
        raise ForgeError(
            f"evaluation: the data set {dataset.uri} has no held-out conversation with an answer to score "
            f"({passed_over} rows passed over); raise data.heldout_fraction, or give data.heldout_source"
        )
    digest, _ = digest_directory(directory / "model")
    candidate = LocalBase(str(directory / "model"))
    models = {"candidate": (candidate, digest), "base": evaluated_base(model, settings, store)}
    if champion.version:
        other = champion_model(name, champion, digest, store, settings)
        if other is not None:
            models["champion"] = other
    judged: dict[str, Judged] = {}
    for who, (of, its_digest) in models.items():
        with Progress() as progress:
            bar = progress.add_task(f"evaluate the {who}", total=len(items))
            tell = functools.partial(_show, progress, bar)
            judged[who] = judge_all(items, answers_of(of, its_digest, items, recipe, store, settings, engine, tell))
    reference = None
    if not champion.version:
        reference = Reference("base", judged["base"])
    elif "champion" in judged:
        reference = Reference("champion", judged["champion"])
    slices = places_by_slice(items)
    verdict = decide(judged["candidate"], reference, slices, gate)
    harness: dict[str, float] = {}
    if recipe.harness_tasks:
        from tasks.evaluate.harness import run_harness

        harness = run_harness(directory / "model", recipe.harness_tasks, settings, recipe.batch_size)
    scores = {who: summarise(items, of) for who, of in judged.items()}
    training = json.loads((directory / "training.json").read_text())
    with store.stage() as staged:
        parquet.write_table(items_table(items, judged, candidate), staged / ITEMS, compression="zstd")
        page = Page(
            name=name,
            items=items,
            judged=judged,
            scores=scores,
            slices=slices,
            verdict=verdict,
            gate=gate,
            reference="" if reference is None else reference.name,
            champion=champion.version,
            harness=harness,
            training=training,
            lineage={
                "Model": model.digest,
                "Data set": dataset.digest,
                "Trained from": " ".join(training["base"].values()).strip(),
                "Champion": f"version {champion.version}, {champion.digest}" if champion.version else "none yet",
                "Items": digest_items(items),
                "Answered by": engine,
            },
        )
        (staged / REPORT).write_text(render_evaluation_report(page), encoding="utf-8")
        card = {
            "kind": "evaluation",
            "model": {"uri": model.uri, "digest": model.digest, "model_digest": digest},
            "dataset": {"uri": dataset.uri, "digest": dataset.digest},
            "champion": champion.model_dump() if champion.version else None,
            "items": {"digest": digest_items(items), "passed_over": passed_over},
            "recipe": recipe.model_dump(mode="json"),
            "gate": gate.model_dump(mode="json"),
            "verdict": verdict.as_json(),
            "scores": {who: dataclasses.asdict(figures) for who, figures in scores.items()},
            "speed": {who: speed_of(of) for who, of in judged.items()},
            "slices": {part: slice_figures(items, judged, places) for part, places in slices.items()},
            "harness": harness,
        }
        (staged / CARD).write_text(json.dumps(without_nan(card), indent=2) + "\n")
        its_digest, _ = digest_directory(staged)
        uri = store.publish(staged, "evaluations")
    mine, base = scores["candidate"], scores["base"]
    result = Evaluation(
        uri=uri,
        digest=its_digest,
        store=store.identity,
        started=started,
        seconds=time.time() - started,
        items=len(items),
        score=mine.score,
        score_base=base.score,
        score_champion=scores["champion"].score if "champion" in scores else None,
        exact_match=mine.exact_match,
        nll=without_nan(mine.nll),
        nll_base=without_nan(base.nll),
        json_validity=mine.json_validity,
        champion=champion.version,
        verdict=verdict.outcome,
        reason=verdict.reason,
        report=f"{uri}/{REPORT}",
    )
    record_completed(store, STAGE, asked, result)
    return recorded(result, name, store, settings)


def recorded(result: Evaluation, name: str, store: Store, settings: Settings) -> Evaluation:
    """A published evaluation, which MLflow knows from here on."""
    card = json.loads((store.path(result.uri) / CARD).read_text())
    tags = {"dataset": card["dataset"]["digest"], MODEL_DIGEST: card["model"]["model_digest"]}
    record_evaluation(settings, name, result, tags, card["harness"], store.path(result.report))
    log.info(f"{result.reason}")
    return result


def without_nan(value: Any) -> Any:
    """A value that JSON can hold: None in place of what is no number."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(progress: Progress, bar: Any, done: int) -> None:
    progress.update(bar, completed=done)


def evaluated_base(model: Model, settings: Settings, store: Store) -> tuple[LocalBase, str]:
    """What a model was trained from, and its digest."""
    base = model.base
    if not base.revision:  # the random weights that it started from, in the store
        path = store.path(base.location)
        return LocalBase(str(path)), digest_directory(path)[0]
    local, digest = local_base(base, settings, store), base.revision
    if is_registered(base.location):  # whose answers may be kept from its own evaluation
        digest = str(store.manifest(base.location).get("model_digest", digest))
    return local, digest


def items_table(items: Sequence[Item], judged: Mapping[str, Judged], candidate: LocalBase) -> pa.Table:
    """Each item with every model's answer, as columns such as `candidate_score`; messages and tools are JSON.

    The tokens are those that the candidate was given, and `scored` the places in `whole_tokens` that its NLL is of: a
    rollout compares what is served with them. `prompt_tokens` are null where they are other ones every day.
    """
    asked = ask_all(candidate, items, quiet=True)
    dated = tells_date(candidate)
    columns: dict[str, Any] = {
        "messages": [json.dumps(item.messages, ensure_ascii=False) for item in items],
        "tools": [json.dumps(item.tools, ensure_ascii=False) if item.tools else None for item in items],
        "expected": [item.expected for item in items],
        "slice": [item.slice for item in items],
        "check": [item.check.model_dump_json(exclude_defaults=True) for item in items],
        "prompt_tokens": pa.array([None if dated else one.prompt for one in asked], pa.list_(pa.int32())),
        "whole_tokens": pa.array([one.whole for one in asked], pa.list_(pa.int32())),
        "scored": pa.array([one.scored for one in asked], pa.list_(pa.int32())),
    }
    for who, of in judged.items():
        columns |= {
            f"{who}_answer": [answer.text for answer in of.answers],
            f"{who}_score": of.score,
            f"{who}_exact": of.exact == 1,
            f"{who}_nll": of.nll,
            f"{who}_ended": [answer.ended for answer in of.answers],
            f"{who}_tokens": [answer.tokens for answer in of.answers],
            f"{who}_seconds": [answer.seconds for answer in of.answers],
            f"{who}_samples": pa.array([list(answer.samples) for answer in of.answers], pa.list_(pa.string())),
        }
    return pa.table(columns)


def slice_figures(items: Sequence[Item], judged: Mapping[str, Judged], places: Any) -> dict[str, Any]:
    """Every model's figures for one slice."""
    part = [items[place] for place in places]
    return {who: dataclasses.asdict(summarise(part, of.part(places))) for who, of in judged.items()}
