"""Scores agree with an independent reckoning, and the report shows them."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.contracts import Base
from tasks.errors import ForgeError
from tasks.evaluate.evaluate import evaluate
from tasks.evaluate.score import Answer, Item, answer_all, batches, by_slice, is_json, read_items, summarise, tokens_of
from tasks.recipe import Recipe
from tests.conftest import Trained


@pytest.fixture
def items(trained: Trained) -> list[Item]:
    return read_items(trained.store.path(trained.dataset.uri) / "heldout.jsonl", 12)


@pytest.fixture
def directory(trained: Trained) -> Path:
    return trained.store.path(trained.model.uri) / "model"


def answers(directory: Path, items: list[Item], batch_size: int) -> list[Answer]:
    return answer_all(Base(location=str(directory)), items, 32, batch_size, lambda done: None)


def test_batched_answers_are_those_of_one_prompt_at_a_time(directory: Path, items: list[Item]) -> None:
    assert [a.text for a in answers(directory, items, 12)] == [a.text for a in answers(directory, items, 1)]


def test_nll_is_transformers_own_loss(directory: Path, items: list[Item]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for item, answer in zip(items, answers(directory, items, 5), strict=True):
        prompt = tokens_of(tokenizer, item.messages, add_generation_prompt=True)
        reply = {"role": "assistant", "content": item.expected}
        whole = torch.tensor([tokens_of(tokenizer, [*item.messages, reply], add_generation_prompt=False)])
        labels = whole.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            assert answer.nll == pytest.approx(model(input_ids=whole, labels=labels).loss.item(), rel=1e-4)


def test_batches_hold_each_item_once_and_like_lengths_together() -> None:
    lengths = [3, 9, 1, 9, 4]
    found = list(batches(lengths, 2))
    assert found == [[1, 3], [4, 0], [2]]


def test_scores_are_means_and_slices_add_up() -> None:
    items = [Item([], '{"a":1}', "x"), Item([], "word", "x"), Item([], "[1]", "y")]
    given = [Answer('{"a":1}', 1.0, True), Answer("other", 2.0, False), Answer("[1", 6.0, False)]
    scores = summarise(items, given)
    assert (scores.items, scores.exact_match, scores.json_validity, scores.nll) == (3, 1 / 3, 0.5, 3.0)
    slices = by_slice(items, given)
    assert {name: (part.items, part.exact_match) for name, part in slices.items()} == {"x": (2, 0.5), "y": (1, 0.0)}
    assert summarise([items[1]], [given[1]]).json_validity is None


@pytest.mark.parametrize(("text", "valid"), [('{"a": 1}', True), ("[]", True), ("1", False), ("{", False), ("", False)])
def test_json_is_an_object_or_an_array(text: str, valid: bool) -> None:
    assert is_json(text) is valid


def test_the_evaluation_says_what_its_items_say(trained: Trained, recipe: Recipe) -> None:
    evaluation = trained.evaluation
    directory = trained.store.path(evaluation.uri)
    lines = [json.loads(line) for line in (directory / "items.jsonl").read_text().splitlines()]
    assert len(lines) == evaluation.items == recipe.evaluation.items
    assert evaluation.exact_match == sum(line["answer"] == line["expected"] for line in lines) / len(lines)
    assert evaluation.nll == pytest.approx(sum(line["nll"] for line in lines) / len(lines))
    assert evaluation.nll < evaluation.nll_before, "training helped"
    card = json.loads((directory / "evaluation.json").read_text())
    assert sum(part["items"] for part in card["slices"]["after"].values()) == evaluation.items


def test_the_same_evaluation_has_the_same_digest(trained: Trained, recipe: Recipe) -> None:
    again = evaluate(trained.dataset, trained.model, recipe.evaluation, trained.store)
    assert again.digest == trained.evaluation.digest


def test_the_report_is_one_page_with_the_scores_and_both_plots(trained: Trained) -> None:
    page = Path(trained.evaluation.report).read_text()
    assert page.count("<svg") == 2
    assert f"{100 * trained.evaluation.exact_match:.1f} %" in page
    assert not re.search(r"(src|href)=.(?!#)", page.replace("xlink:href", "href")), "nothing is fetched"
    assert "#7a7a7a" not in page, "plots take the page's own text colour"


def test_markup_in_answers_stays_text(trained: Trained) -> None:
    from tasks.evaluate.report import render_report

    items = [Item([{"role": "user", "content": "<script>alert(1)</script>"}], "x", "<b>")]
    given = [Answer("<img src=x>", 1.0, False)]
    slices = {"before": by_slice(items, given), "after": by_slice(items, given)}
    training = json.loads((trained.store.path(trained.model.uri) / "training.json").read_text())
    page = render_report(items, given, given, slices, training, {})
    assert "<script>" not in page
    assert "<img src=x>" not in page
    assert "&lt;b&gt;" in page


def test_nothing_held_out_is_an_error(trained: Trained, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "heldout.jsonl").write_text("")
    empty = trained.dataset.model_copy(update={"uri": tmp_path.as_uri()})
    with pytest.raises(ForgeError, match="no held-out rows"):
        evaluate(empty, trained.model, recipe.evaluation, trained.store)
