"""The published files of an evaluation: the items with all answers, the report, and the card with all figures."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from forge.core.contracts import Champion, Dataset, Evaluation, Model
from forge.core.digest import digest_directory
from forge.core.recipe import EvaluationRecipe, GateRecipe
from forge.registry.packages import LocalBase
from forge.storage import Store
from tasks.evaluate.ask import ask_all, shows_date
from tasks.evaluate.evaluation_report import Page, render_evaluation_report
from tasks.evaluate.gate import Verdict
from tasks.evaluate.items import Item, digest_items
from tasks.evaluate.score import Judged, Scores, speed_of, summarise

CARD, REPORT, ITEMS = "evaluation.json", "report.html", "items.parquet"


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, on which data, against which champion, and by which rules."""

    name: str
    dataset: Dataset
    model: Model
    champion: Champion
    recipe: EvaluationRecipe
    gate: GateRecipe


@dataclass(frozen=True)
class EvaluationResults:
    """The scored answers and the verdict.

    `judged` and `scores` have entries for candidate, base and (if compared) champion. `reference` is the model that
    the gate compared the candidate with, "" if the candidate is the champion itself. `skipped` held-out rows could not
    be scored. `slices` has the indices of each slice's items.
    """

    candidate: LocalBase
    model_digest: str
    engine: str
    items: list[Item]
    skipped: int
    judged: Mapping[str, Judged]
    scores: Mapping[str, Scores]
    slices: Mapping[str, np.ndarray]
    reference: str
    verdict: Verdict
    harness: Mapping[str, float]


def publish_evaluation(request: EvaluationRequest, results: EvaluationResults, store: Store) -> tuple[str, str]:
    """Publish the files of an evaluation; returns the URI and the digest."""
    training = json.loads((store.path(request.model.uri) / "training.json").read_text(encoding="utf-8"))
    with store.stage("the evaluation") as staged:
        write_items(results, staged / ITEMS)
        page = report_page(request, results, training)
        (staged / REPORT).write_text(render_evaluation_report(page), encoding="utf-8")
        card = evaluation_card(request, results)
        (staged / CARD).write_text(json.dumps(finite_or_none(card), indent=2) + "\n", encoding="utf-8")
        digest, _ = digest_directory(staged)
        return store.publish(staged, "evaluations"), digest


def read_card(evaluation: Evaluation, store: Store) -> dict[str, Any]:
    """The card of a published evaluation."""
    card: dict[str, Any] = json.loads((store.path(evaluation.uri) / CARD).read_text(encoding="utf-8"))
    return card


def evaluation_card(request: EvaluationRequest, results: EvaluationResults) -> dict[str, Any]:
    """All figures of an evaluation, with the digests of its inputs."""
    return {
        "kind": "evaluation",
        "model": {
            "uri": request.model.uri,
            "digest": request.model.digest,
            "model_digest": results.model_digest,
        },
        "dataset": {"uri": request.dataset.uri, "digest": request.dataset.digest},
        "champion": request.champion.model_dump() if request.champion.version else None,
        "items": {"digest": digest_items(results.items), "skipped": results.skipped},
        "recipe": request.recipe.model_dump(mode="json"),
        "gate": request.gate.model_dump(mode="json"),
        "verdict": results.verdict.as_json(),
        "scores": {who: dataclasses.asdict(scores) for who, scores in results.scores.items()},
        "speed": {who: speed_of(judged) for who, judged in results.judged.items()},
        "slices": {name: slice_scores(results, indices) for name, indices in results.slices.items()},
        "harness": dict(results.harness),
    }


def slice_scores(results: EvaluationResults, indices: np.ndarray) -> dict[str, Any]:
    """Every model's scores on one slice."""
    part = [results.items[index] for index in indices]
    return {who: dataclasses.asdict(summarise(part, judged.part(indices))) for who, judged in results.judged.items()}


def report_page(request: EvaluationRequest, results: EvaluationResults, training: dict[str, Any]) -> Page:
    """The contents of the report."""
    champion = request.champion
    return Page(
        name=request.name,
        items=results.items,
        judged=results.judged,
        scores=results.scores,
        slices=results.slices,
        verdict=results.verdict,
        gate=request.gate,
        reference=results.reference,
        champion=champion.version,
        harness=results.harness,
        training=training,
        lineage={
            "Model": request.model.digest,
            "Data set": request.dataset.digest,
            "Trained from": " ".join(training["base"].values()).strip(),
            "Champion": f"version {champion.version}, {champion.digest}" if champion.version else "none yet",
            "Items": digest_items(results.items),
            "Engine": results.engine,
        },
    )


def write_items(results: EvaluationResults, path: Path) -> None:
    """Write the items with all answers as Parquet."""
    table = items_table(results.items, results.judged, results.candidate)
    parquet.write_table(table, path, compression="zstd")


def items_table(items: Sequence[Item], judged: Mapping[str, Judged], candidate: LocalBase) -> pa.Table:
    """Each item with every model's answer in columns such as `candidate_score`; messages and tools are JSON.

    A rollout compares the served model with the candidate, by these columns: `prompt_tokens` and `whole_tokens` are
    the candidate's tokens, and `scored` the indices in `whole_tokens` that its NLL covers. `prompt_tokens` are null if
    the chat template contains the current date, since a server's prompts then differ every day.
    """
    asked = ask_all(candidate, items, quiet=True)
    dated = shows_date(candidate)
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


def finite_or_none(value: Any) -> Any:
    """A value for JSON, with None instead of NaN and infinity, also inside lists and mappings."""
    if isinstance(value, dict):
        return {key: finite_or_none(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
