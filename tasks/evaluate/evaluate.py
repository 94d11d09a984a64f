"""The stage's work: score the model and what it was trained from on the same items, and write the report."""

import dataclasses
import json
import time

from rich.progress import Progress

from tasks.contracts import Base, Dataset, Evaluation, Model
from tasks.errors import ForgeError
from tasks.evaluate.report import render_report
from tasks.evaluate.score import Answer, answer_all, by_slice, read_items, summarise
from tasks.recipe import EvaluationRecipe
from tasks.storage import DirectoryStore, digest_directory

CARD = "evaluation.json"
REPORT = "report.html"


def evaluate(dataset: Dataset, model: Model, recipe: EvaluationRecipe, store: DirectoryStore) -> Evaluation:
    """Answer the held-out prompts with the base model and with the trained one, score both, publish answers and report.

    The result is a directory: `items.jsonl` (each prompt with the expected answer, both models' answers and NLL),
    `report.html`, and the card `evaluation.json`.
    """
    started = time.time()
    directory = store.path(model.uri)
    items = read_items(store.path(dataset.uri) / "heldout.jsonl", recipe.items)
    if not items:
        raise ForgeError(f"evaluation: the data set {dataset.uri} has no held-out rows; raise data.heldout_fraction")
    base = model.base
    if base.location.startswith("file://"):
        base = Base(location=str(store.path(base.location)))

    def answers(name: str, of: Base) -> list[Answer]:
        with Progress() as progress:
            bar = progress.add_task(f"evaluate {name} training", total=len(items))

            def tell(done: int) -> None:
                progress.update(bar, completed=done)

            return answer_all(of, items, recipe.max_new_tokens, recipe.batch_size, tell)

    before = answers("before", base)
    after = answers("after", Base(location=str(directory / "model")))
    scores, scores_before = summarise(items, after), summarise(items, before)
    with store.stage() as staged:
        with (staged / "items.jsonl").open("w", encoding="utf-8") as file:
            for item, old, new in zip(items, before, after, strict=True):
                value = {
                    **dataclasses.asdict(item),
                    "answer": new.text,
                    "nll": new.nll,
                    "exact": new.exact,
                    "answer_before": old.text,
                    "nll_before": old.nll,
                    "exact_before": old.exact,
                }
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
        training = json.loads((directory / "training.json").read_text())
        slices = {"after": by_slice(items, after), "before": by_slice(items, before)}
        facts = {
            "Model": model.digest,
            "Data set": dataset.digest,
            "Trained from": " ".join(training["base"].values()).strip(),
        }
        page = render_report(items, before, after, slices, training, facts)
        (staged / REPORT).write_text(page, encoding="utf-8")
        card = {
            "kind": "evaluation",
            "model": {"uri": model.uri, "digest": model.digest},
            "dataset": {"uri": dataset.uri, "digest": dataset.digest},
            "recipe": recipe.model_dump(mode="json"),
            "before": dataclasses.asdict(scores_before),
            "after": dataclasses.asdict(scores),
            "slices": {name: {k: dataclasses.asdict(v) for k, v in part.items()} for name, part in slices.items()},
        }
        (staged / CARD).write_text(json.dumps(card, indent=2) + "\n")
        digest, _ = digest_directory(staged)
        uri = store.publish(staged, "evaluations")
    print(
        f"evaluate: exact match {scores_before.exact_match:.1%} -> {scores.exact_match:.1%} "
        f"on {len(items)} held-out prompts"
    )
    return Evaluation(
        uri=uri,
        digest=digest,
        store=store.identity,
        started=started,
        seconds=time.time() - started,
        items=len(items),
        exact_match=scores.exact_match,
        exact_match_before=scores_before.exact_match,
        nll=scores.nll,
        nll_before=scores_before.nll,
        json_validity=scores.json_validity,
        report=str(store.path(uri) / REPORT),
    )
