"""The score of an answer, by each kind of check."""

import math

import numpy as np
import pytest

from forge.core.recipe import Check
from tasks.evaluate.answer import Answer
from tasks.evaluate.items import Item, is_json
from tasks.evaluate.score import indices_by_slice, judge, judge_all, last_number, normalise, summarise

EXACT = Check(kind="exact")


@pytest.mark.parametrize(
    ("check", "expected", "answer", "score"),
    [
        ({"kind": "exact"}, "Yes", " Yes\n", 1),
        ({"kind": "exact"}, "Yes", "yes", 0),
        ({"kind": "normalised"}, "It's  Paris!", "it s paris", 1),
        ({"kind": "normalised"}, "Straße", "STRASSE", 1),
        ({"kind": "normalised"}, "ﬁne", "fine", 1),
        ({"kind": "normalised"}, "Paris", "London", 0),
        ({"kind": "json"}, '{"a": 1, "b": [1, 2]}', '{"b":[1,2],"a":1.0}', 1),
        ({"kind": "json"}, '{"a": 1, "b": [1, 2]}', '{"a": 1, "b": [1, 3]}', 2 / 3),
        ({"kind": "json"}, '{"a": 1}', '{"a": 1, "c": 2}', 1 / 2),
        ({"kind": "json"}, '{"a": 1}', '{"a": true}', 0),
        ({"kind": "json"}, '{"a": {}}', '{"a": {}}', 1),
        ({"kind": "json"}, '{"a": {}}', '{"a": []}', 0),
        ({"kind": "json"}, '{"a": 1}', '{"a": 1', 0),
        ({"kind": "json"}, '{"a": null}', "{}", 0),
        ({"kind": "regex", "pattern": r"\b42\b"}, "", "It is 42.", 1),
        ({"kind": "regex", "pattern": r"^\d+$"}, "", "It is 42.", 0),
        ({"kind": "number"}, "1,234.5", "so 2 and 1234.5.", 1),
        ({"kind": "number"}, "100", "101", 0),
        ({"kind": "number", "tolerance": 0.01}, "100", "101", 1),
        ({"kind": "number", "tolerance": 0.01}, "-3e2", "the answer is -302", 1),
        ({"kind": "number"}, "7", "none", 0),
        # Lin 2004, section 3.1
        ({"kind": "rouge"}, "police killed the gunman", "police kill the gunman", 3 / 4),
        ({"kind": "rouge"}, "police killed the gunman", "the gunman kill police", 2 / 4),
        ({"kind": "rouge"}, "ein Bär, zwei Bären", "zwei Bären", 2 * 2 / 6),
        ({"kind": "rouge"}, "東京都に住む", "東京に住む", 2 * 5 / 11),
        ({"kind": "rouge"}, "a", "", 0),
    ],
)
def test_each_kind_of_check(check: dict, expected: str, answer: str, score: float) -> None:
    assert judge(Check.model_validate(check), expected, answer) == pytest.approx(score)


@pytest.mark.parametrize(("text", "number"), [("1,000 of 2,500", 2500), ("x", None), ("-.5", -0.5), ("3.", 3)])
def test_the_last_number_is_used(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_normalise_is_idempotent() -> None:
    for text in ("It's  Paris!", "Ａｂｃ", "ß.", "٣"):
        assert normalise(normalise(text)) == normalise(text)


def test_scores_are_means_over_items_and_perplexity_is_over_tokens() -> None:
    items = [
        Item([], '{"a":1}', "x", Check(kind="json")),
        Item([], "word", "x", EXACT),
        Item([], "[1]", "y", Check(kind="json")),
    ]
    answers = [
        Answer('{"a":1}', 4, True, 0.5, 2.0, 2, ('{"a":1}', "no")),
        Answer("other", 2, True, 0.5, 2.0, 1, ("word", "word")),
        Answer("[1", 2, False, 0.5, 60.0, 10, ("", "")),
    ]
    judged = judge_all(items, answers)
    scores = summarise(items, judged)
    assert (scores.items, scores.score, scores.exact_match, scores.json_validity) == (3, 1 / 3, 1 / 3, 0.5)
    assert scores.nll == pytest.approx((1 + 2 + 6) / 3)
    assert scores.perplexity == pytest.approx(math.exp(64 / 13))
    assert scores.ended == pytest.approx(2 / 3)
    assert scores.sampled_score == pytest.approx(3 / 6)
    slices = indices_by_slice(items)
    assert {name: indices.tolist() for name, indices in slices.items()} == {"x": [0, 1], "y": [2]}
    assert summarise([items[1]], judged.part(np.array([1]))).json_validity is None


@pytest.mark.parametrize(("text", "valid"), [('{"a": 1}', True), ("[]", True), ("1", False), ("{", False), ("", False)])
def test_json_is_an_object_or_an_array(text: str, valid: bool) -> None:
    assert is_json(text) is valid
