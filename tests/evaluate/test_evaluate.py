"""A whole evaluation: its files, the comparison with the champion, the cache, and broken models."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from forge.core.contracts import Champion, Evaluation, Model
from forge.core.digest import digest_directory
from forge.core.errors import ForgeError
from forge.core.recipe import GateRecipe, Recipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import find_champion, open_registry
from forge.registry.mlflow_runs import EXPERIMENT
from forge.registry.promotion import promote
from tasks.evaluate import answer_cache
from tasks.evaluate.evaluate import evaluate
from tasks.evaluate.record import record_evaluation
from tasks.register.register import register
from tests.conftest import Trained

ANY = GateRecipe(metric="nll", min_json_validity=0, min_finished=0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An empty registry."""
    return Settings(home=tmp_path / "registry")


def judge(trained: Trained, recipe: Recipe, settings: Settings, model: Model | None = None, **options) -> Evaluation:
    """Evaluate a model (by default the trained one) against the registry of the settings."""
    gate = options.pop("gate", ANY)
    evaluation = recipe.evaluation.model_copy(update=options)
    champion = find_champion(open_registry(settings), recipe.name) or Champion()
    candidate = model or trained.model
    return evaluate(recipe.name, trained.dataset, candidate, champion, evaluation, gate, trained.store, settings)


def damaged(trained: Trained, tmp_path: Path, change) -> Model:
    """The trained model with its weights changed."""
    directory = tmp_path / "damaged"
    shutil.copytree(trained.store.path(trained.model.uri), directory)
    file = directory / "model" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return trained.model.model_copy(update={"uri": directory.as_uri(), "digest": digest_directory(directory)[0]})


def make_champion(trained: Trained, recipe: Recipe, settings: Settings) -> Path:
    """Make the trained model the champion; returns its package."""
    version = register(recipe, trained.dataset, trained.model, trained.evaluation, settings, trained.store)
    promote(open_registry(settings), trained.store, recipe.name, version.version, "", "a test")
    return trained.store.path(version.uri)


def test_metrics_are_means_over_the_items(trained: Trained, recipe: Recipe) -> None:
    evaluation = trained.evaluation
    directory = trained.store.path(evaluation.uri)
    rows = parquet.read_table(directory / "items.parquet").to_pylist()
    assert len(rows) == evaluation.items == recipe.evaluation.items
    assert evaluation.exact_match == sum(row["candidate_answer"] == row["expected"] for row in rows) / len(rows)
    assert evaluation.nll == pytest.approx(sum(row["candidate_nll"] for row in rows) / len(rows))
    assert evaluation.nll < evaluation.nll_base, "training helped"
    assert (evaluation.verdict, evaluation.champion, evaluation.score_champion) == ("passed", "", None)
    card = json.loads((directory / "evaluation.json").read_text())
    assert sum(part["candidate"]["items"] for part in card["slices"].values()) == evaluation.items
    assert card["verdict"]["outcome"] == "passed"
    assert [finding["rule"] for finding in card["verdict"]["findings"]][-1] == "base"
    assert card["speed"]["candidate"]["tokens_per_second"] > 0


def test_answers_are_cached_by_model_prompts_and_engine(
    trained: Trained, recipe: Recipe, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = judge(trained, recipe, settings)

    def never(*arguments: object) -> None:
        raise AssertionError("it answered again")

    monkeypatch.setattr(answer_cache, "answer_with_transformers", never)
    other = judge(trained, recipe, settings, gate=GateRecipe(min_items=33))  # the gate is not in the key
    assert (other.score, other.nll) == (first.score, first.nll)
    with pytest.raises(AssertionError, match="answered again"):
        judge(trained, recipe, settings, max_new_tokens=8)
    monkeypatch.setattr("tasks.evaluate.evaluate.choose_engine", lambda *arguments: "transformers 6.0.0, torch 3.0.0")
    with pytest.raises(AssertionError, match="answered again"):  # another release may answer differently
        judge(trained, recipe, settings)


def test_a_published_evaluation_is_not_repeated(
    trained: Trained, recipe: Recipe, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt is interrupted before it is recorded in MLflow; the second one records it."""

    gate = ANY.model_copy(update={"min_items": 29})  # a new evaluation, of answers that are cached

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tasks.evaluate.evaluate.record_evaluation", interrupt)
        judge(trained, recipe, settings, gate=gate)
    published = {path.as_uri() for path in (trained.store.root / "evaluations").iterdir()}
    for step in ("cached_answers", "decide", "publish_evaluation"):
        monkeypatch.setattr(f"tasks.evaluate.evaluate.{step}", interrupt)
    found = judge(trained, recipe, settings, gate=gate)
    assert found.uri in published
    client = open_registry(settings)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.data.metrics["score"] == found.score
    assert run.data.tags["dataset"] == trained.dataset.digest
    for change in ({"items": 30, "gate": gate}, {"gate": GateRecipe(non_inferiority_margin=0.5)}):
        with pytest.raises(KeyboardInterrupt):
            judge(trained, recipe, settings, **change)


def test_experiments_have_the_suffix_of_the_domain(trained: Trained, recipe: Recipe, settings: Settings) -> None:
    judge(trained, recipe, settings.model_copy(update={"name_suffix": "-development"}))
    client = open_registry(settings)
    assert client.get_experiment_by_name(EXPERIMENT) is None
    assert len(client.search_runs([client.get_experiment_by_name(f"{EXPERIMENT}-development").experiment_id])) == 1


def test_missing_gpus_are_an_error(
    trained: Trained, recipe: Recipe, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ForgeError, match=r"this pod requested 2, and torch sees 1 on .*nvidia-smi"):
        judge(trained, recipe, settings.model_copy(update={"gpus": 2}))


def test_engine_vllm_needs_vllm(trained: Trained, recipe: Recipe, settings: Settings) -> None:
    without = settings.model_copy(update={"serving_python": Path(sys.executable)})
    with pytest.raises(ForgeError, match=r"evaluation\.engine vllm: vLLM is not installed for .*make setup"):
        judge(trained, recipe, without, engine="vllm")


def test_a_metric_name_that_mlflow_rejects_is_an_error(trained: Trained, settings: Settings) -> None:
    report = trained.store.path(trained.evaluation.report)
    with pytest.raises(ForgeError, match=r"MLflow sqlite.*could not be recorded \(.*fix that and run again"):
        record_evaluation(settings, "dates", trained.evaluation, {}, {"pass@1": 0.5}, report)
    record_evaluation(settings, "dates", trained.evaluation, {}, {"pass_1": 0.5}, report)
    client = open_registry(settings)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["pass_1"] == 0.5


def test_every_evaluation_is_one_run_in_mlflow(trained: Trained, recipe: Recipe, settings: Settings) -> None:
    found = judge(trained, recipe, settings)
    judge(trained, recipe, settings)
    client = open_registry(settings)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.data.metrics["score"] == found.score
    assert (run.data.tags["verdict"], run.data.tags["reason"]) == ("passed", found.reason)
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_the_champion_passes_and_a_worse_model_is_rejected(
    trained: Trained, recipe: Recipe, settings: Settings, tmp_path: Path
) -> None:
    make_champion(trained, recipe, settings)
    again = judge(trained, recipe, settings)
    assert (again.verdict, again.champion) == ("passed", "1")
    assert "already the champion" in again.reason
    worse = damaged(trained, tmp_path, lambda weights: [weight.mul_(0.5) for weight in weights.values()])
    found = judge(trained, recipe, settings, worse)
    assert found.verdict == "rejected"
    assert found.reason.startswith("rejected by champion: NLL ")
    page = trained.store.path(found.report).read_text()
    assert "Regressions against the champion" in page
    assert found.reason in page


@pytest.mark.parametrize("damage", ["missing", "without its manifest", "damaged"])
def test_a_missing_or_damaged_champion_is_an_error(
    damage: str, trained: Trained, recipe: Recipe, settings: Settings, tmp_path: Path
) -> None:
    package = make_champion(trained, recipe, settings)
    kept = tmp_path / "kept"
    shutil.copytree(package, kept)
    try:
        if damage == "missing":
            shutil.rmtree(package)
        elif damage == "damaged":
            (package / "config.json").write_text("{}")
        else:
            (package / "manifest.json").unlink()
        with pytest.raises(ForgeError, match=r"champion dates version 1: .*alias champion") as caught:
            judge(trained, recipe, settings)
        assert {"missing": "is gone", "damaged": "config.json is damaged"}.get(
            damage, "manifest"
        ) in caught.value.message
    finally:
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(kept, package)


def test_nan_weights_are_rejected(trained: Trained, recipe: Recipe, settings: Settings, tmp_path: Path) -> None:
    def poison(weights: dict) -> None:
        weights["model.norm.weight"].fill_(float("nan"))

    found = judge(trained, recipe, settings, damaged(trained, tmp_path, poison))
    assert found.verdict == "rejected"
    assert "finite" in found.reason
    card = (trained.store.path(found.uri) / "evaluation.json").read_text()
    assert "NaN" not in card, "the card is valid JSON"


def test_a_model_that_never_ends_its_turn_is_rejected(
    trained: Trained, recipe: Recipe, settings: Settings, tmp_path: Path
) -> None:
    end = json.loads((trained.store.path(trained.model.uri) / "model" / "config.json").read_text())["eos_token_id"]

    def endless(weights: dict) -> None:
        weights["model.embed_tokens.weight"][end].zero_()  # tied to the output, so it is never the most likely token

    found = judge(trained, recipe, settings, damaged(trained, tmp_path, endless), gate=GateRecipe(min_json_validity=0))
    assert found.verdict == "rejected"
    ended = json.loads((trained.store.path(found.uri) / "evaluation.json").read_text())["scores"]["candidate"]["ended"]
    assert ended < 0.95


def test_one_item_is_inconclusive(trained: Trained, recipe: Recipe, settings: Settings) -> None:
    found = judge(trained, recipe, settings, items=1)
    assert found.verdict == "inconclusive"
    assert "1 items; gate.min_items is 30" in found.reason


def test_an_empty_held_out_set_fails(trained: Trained, recipe: Recipe, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "heldout.jsonl").write_text('{"text": "plain", "slice": "s"}\n')
    empty = trained.dataset.model_copy(update={"uri": tmp_path.as_uri(), "digest": "empty"})
    with pytest.raises(ForgeError, match=r"no held-out conversation .*1 rows skipped"):
        evaluate("dates", empty, trained.model, Champion(), recipe.evaluation, ANY, trained.store, settings)


def test_the_report_is_one_self_contained_page(trained: Trained) -> None:
    page = trained.store.path(trained.evaluation.report).read_text()
    assert page.count("<svg") == 3
    assert f"{100 * trained.evaluation.score:.1f}%" in page
    assert trained.evaluation.reason in page
    assert "light-dark(" in page
    assert not re.search(r"(src|href)=.(?!#)", page.replace("xlink:href", "href")), "no external resources"
    assert "#7a7a7a" not in page, "plots are in the page's text colour"


def test_markup_in_rows_is_escaped(trained: Trained, recipe: Recipe, settings: Settings, tmp_path: Path) -> None:
    rows = (trained.store.path(trained.dataset.uri) / "heldout.jsonl").read_text().splitlines()
    asked = {"role": "user", "content": "<script>alert(1)</script>"}
    bad = {"messages": [asked, {"role": "assistant", "content": "<img src=x>"}], "slice": "<b>"}
    (tmp_path / "heldout.jsonl").write_text("\n".join([json.dumps(bad), *rows]))
    dataset = trained.dataset.model_copy(update={"uri": tmp_path.as_uri(), "digest": "markup"})
    found = evaluate("dates", dataset, trained.model, Champion(), recipe.evaluation, ANY, trained.store, settings)
    page = trained.store.path(found.report).read_text()
    assert "<script>" not in page
    assert "<img src=x>" not in page
    assert "&lt;script&gt;" in page
