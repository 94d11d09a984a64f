"""The gate's error rates by simulation, its rules one by one, and inputs that decide nothing."""

import functools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from forge.core.recipe import GateRecipe
from tasks.evaluate.answer import Answer
from tasks.evaluate.gate import Reference, Verdict, decide
from tasks.evaluate.score import Judged

pytestmark = pytest.mark.usefixtures("cached_resampling")

ITEMS, TRIALS = 500, 2000
GATE = GateRecipe()


@functools.cache
def some_answers(items: int, ended: float) -> list[Answer]:
    """Answers of which a share has ended."""
    return [Answer("", 1, at < ended * items, 0.1, 1.0, 1) for at in range(items)]


def judged(score: np.ndarray, nll: np.ndarray | None = None, ended: float = 1.0, valid: float = math.nan) -> Judged:
    """Answers with these scores, of which a share ended and a share is valid JSON (NaN: no JSON is expected)."""
    items = len(score)
    json = np.full(items, np.nan) if math.isnan(valid) else (np.arange(items) < valid * items).astype(float)
    return Judged(
        some_answers(items, ended), score, (score == 1).astype(float), json, np.ones(items) if nll is None else nll
    )


def against(new: Judged, old: Judged, gate: GateRecipe = GATE, slices: dict | None = None) -> Verdict:
    return decide(new, Reference("champion", old), slices or {}, gate)


def outcomes(draw: np.random.Generator, items: int, drop: float, differ: float = 0.06) -> tuple:
    """Scores of a new and an old model that are right on about 90 % of the items.

    On a share `differ` of the items only one of them is right, by chance; on a further share `drop` it is the old one.
    """
    drawn = draw.random(items)
    lost, gained = drawn < differ / 2 + drop, drawn > 1 - differ / 2
    both = draw.random(items) < 0.9
    return np.where(lost, 0.0, np.where(gained, 1.0, both)), np.where(lost, 1.0, np.where(gained, 0.0, both))


def rates(scenario, slices: dict | None = None, trials: int = TRIALS) -> dict[str, float]:
    """The share of each outcome in a scenario."""
    found: Counter[str] = Counter()
    for trial in range(trials):
        new, old = scenario(np.random.default_rng(trial))
        found[against(judged(new), judged(old), slices=slices).outcome] += 1
    shares = {outcome: found[outcome] / trials for outcome in ("passed", "rejected", "inconclusive")}
    print(f"{scenario.__name__}: {shares}")
    return shares


def test_equal_models_are_rarely_rejected() -> None:
    def equal(draw):
        return outcomes(draw, ITEMS, drop=0)

    found = rates(equal)
    assert found["rejected"] <= 0.05
    assert found["passed"] >= 0.95


def test_equal_models_with_eight_slices_are_rarely_rejected() -> None:
    def equal_in_eight_slices(draw):
        return outcomes(draw, ITEMS, drop=0)

    eight = {f"slice {at}": np.arange(ITEMS)[at::8] for at in range(8)}
    found = rates(equal_in_eight_slices, eight, trials=500)
    assert found["rejected"] <= 0.05
    assert found["passed"] >= 0.9


def test_a_drop_of_five_points_rarely_passes() -> None:
    def drop_of_five_points(draw):
        return outcomes(draw, ITEMS, drop=0.05)

    found = rates(drop_of_five_points)
    assert found["passed"] <= 0.05


def independent(draw: np.random.Generator, items: int, new: float, old: float) -> tuple:
    return (draw.random(items) < new).astype(float), (draw.random(items) < old).astype(float)


def test_with_independent_errors_the_error_rates_hold_and_the_rest_is_inconclusive() -> None:
    def equal_but_independent(draw):
        return independent(draw, ITEMS, 0.9, 0.9)

    def five_points_and_independent(draw):
        return independent(draw, ITEMS, 0.85, 0.9)

    equal = rates(equal_but_independent, trials=1000)
    dropped = rates(five_points_and_independent, trials=1000)
    assert equal["rejected"] <= 0.05
    assert dropped["passed"] <= 0.05
    assert equal["inconclusive"] > 0.1, "500 items are too few to decide"


@pytest.mark.parametrize("items", [50, 120])
def test_a_collapsed_slice_rarely_passes(items: int) -> None:
    def collapsed_slice(draw):
        (new, old), (bad, good) = outcomes(draw, ITEMS - items, drop=0), outcomes(draw, items, drop=0.2)
        return np.concatenate([bad, new]), np.concatenate([good, old])

    slices = {"bad": np.arange(items), "rest": np.arange(items, ITEMS)}
    found = rates(collapsed_slice, slices, trials=1000)
    assert found["passed"] <= 0.05


def test_an_inconclusive_verdict_says_how_many_items_would_decide() -> None:
    new, old = np.ones(ITEMS), np.ones(ITEMS)
    new[:50], old[50:90] = 0, 0
    found = against(judged(new), judged(old))
    assert found.outcome == "inconclusive"
    assert "not shown to be non-inferior within a margin of 4.0 points; about " in found.reason
    assert "items would decide" in found.reason


def test_the_same_inputs_give_the_same_verdict() -> None:
    new, old = outcomes(np.random.default_rng(5), ITEMS, drop=0.02)
    assert against(judged(new), judged(old)) == against(judged(new.copy()), judged(old.copy()))


def test_a_rejection_is_one_line_with_rule_and_figures() -> None:
    new, old = outcomes(np.random.default_rng(6), ITEMS, drop=0.3)
    found = against(judged(new), judged(old))
    assert found.outcome == "rejected"
    assert "\n" not in found.reason
    for part in ("rejected by champion", f"score {new.mean():.1%} against {old.mean():.1%}", "95% bounds", "500 items"):
        assert part in found.reason
    (finding,) = [finding for finding in found.findings if finding.rule == "champion"]
    assert finding.high is not None
    assert finding.high < 0
    assert finding.threshold == -GATE.non_inferiority_margin
    assert found.as_json()["findings"][0]["rule"] == "items"


def test_a_required_improvement_must_be_shown() -> None:
    superior = GateRecipe(require_improvement=True)
    new, old = outcomes(np.random.default_rng(7), ITEMS, drop=0)
    assert against(judged(new), judged(old)).outcome == "passed"
    assert against(judged(new), judged(old), superior).outcome == "inconclusive"
    old, new = outcomes(np.random.default_rng(7), ITEMS, drop=0.1)
    assert against(judged(new), judged(old), superior).outcome == "passed"


def test_a_first_model_must_be_better_than_its_base() -> None:
    old, new = outcomes(np.random.default_rng(8), ITEMS, drop=0.2)
    assert decide(judged(new), Reference("base", judged(old)), {}, GATE).outcome == "passed"
    found = decide(judged(old), Reference("base", judged(new)), {}, GATE)
    assert found.outcome == "rejected"
    assert "rejected by base" in found.reason


def test_the_champion_itself_is_judged_by_the_candidate_rules_alone() -> None:
    good = judged(np.ones(ITEMS))
    assert decide(good, None, {}, GATE).outcome == "passed"
    assert decide(good, None, {}, GateRecipe(min_items=501)).outcome == "inconclusive"


def test_the_metric_can_be_nll() -> None:
    gate = GateRecipe(metric="nll")
    draw = np.random.default_rng(9)
    old = draw.gamma(2, 0.5, ITEMS)
    score = np.zeros(ITEMS)
    better = against(judged(score, old - 0.1 * draw.random(ITEMS)), judged(score, old), gate)
    worse = against(judged(score, old + 0.3), judged(score, old), gate)
    assert better.outcome == "passed"
    assert worse.outcome == "rejected"
    assert f"NLL {(old + 0.3).mean():.4f} against {old.mean():.4f}, difference +0.3000" in worse.reason


def test_nll_is_not_compared_across_tokenizers() -> None:
    score, nll = np.ones(ITEMS), np.ones(ITEMS)
    others = [replace(answer, nll_tokens=2) for answer in judged(score).answers]
    old = replace(judged(score, 2 * nll), answers=others)
    found = against(judged(score, nll), old, GateRecipe(metric="nll"))
    assert found.outcome == "inconclusive"
    assert "the models' tokenizers differ" in found.reason
    assert against(judged(score), replace(judged(np.zeros(ITEMS)), answers=others)).outcome == "passed"


@pytest.mark.parametrize("both", [0, 1, 2, 29])
def test_too_few_pairs_are_inconclusive(both: int) -> None:
    """The champion's context is shorter, so it has no likelihood for most items."""
    champion = judged(np.zeros(ITEMS), np.r_[np.full(both, 9.0), np.full(ITEMS - both, np.nan)])
    found = against(judged(np.ones(ITEMS)), champion, GateRecipe(metric="nll"))
    assert found.outcome == "inconclusive"
    assert f"{both} items have values from both models" in found.reason


@pytest.mark.parametrize(
    ("candidate", "gate", "outcome", "rule"),
    [
        (judged(np.ones(ITEMS), ended=0.5), GATE, "rejected", "finished"),
        (judged(np.ones(ITEMS), ended=0.0), GATE, "rejected", "finished"),
        (judged(np.ones(ITEMS), valid=0.9), GATE, "rejected", "valid JSON"),
        (judged(np.ones(ITEMS), np.full(ITEMS, np.nan)), GATE, "rejected", "finite"),
        (judged(np.ones(ITEMS), np.r_[np.inf, np.ones(ITEMS - 1)]), GATE, "rejected", "finite"),
        (judged(np.ones(ITEMS), np.full(ITEMS, np.nan)), GateRecipe(metric="nll"), "rejected", "finite"),
        (judged(np.ones(1)), GATE, "inconclusive", "items"),
        (judged(np.ones(29)), GATE, "inconclusive", "items"),
        (judged(np.r_[np.ones(300), np.zeros(200)]), GateRecipe(min_score=0.7), "rejected", "min_score"),
        (judged(np.r_[np.ones(350), np.zeros(150)]), GateRecipe(min_score=0.7), "inconclusive", "min_score"),
    ],
)
def test_candidate_rules(candidate: Judged, gate: GateRecipe, outcome: str, rule: str) -> None:
    found = decide(candidate, None, {}, gate)
    assert found.outcome == outcome
    assert [finding.outcome for finding in found.findings if finding.rule == rule] == [outcome]
    champion = judged(np.zeros(len(candidate.answers)), np.full(len(candidate.answers), 9.0))
    assert against(candidate, champion, gate).outcome == outcome, "even if it is far better than the champion"


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("metric", ["score", "nll"])
def test_models_that_are_equal_on_every_item_are_inconclusive(value: float, metric: str) -> None:
    gate = GateRecipe(metric=metric)
    same = judged(np.full(ITEMS, value))
    found = against(same, judged(np.full(ITEMS, value)), gate)
    assert found.outcome == "inconclusive"
    assert "equal on every item" in found.reason


def test_right_on_every_item_against_wrong_on_every_item_passes() -> None:
    found = decide(judged(np.ones(ITEMS)), Reference("base", judged(np.zeros(ITEMS))), {}, GATE)
    assert found.outcome == "passed"


def test_slices_with_few_items_are_not_tested() -> None:
    new, old = np.ones(ITEMS), np.r_[np.zeros(60), np.ones(ITEMS - 60)]
    new[-49:] = 0
    slices = {"few": np.arange(ITEMS - 49, ITEMS), "many": np.arange(ITEMS - 49)}
    found = against(judged(new), judged(old), slices=slices)
    assert [finding.rule for finding in found.findings if finding.rule.startswith("slice")] == ["slice many"]
