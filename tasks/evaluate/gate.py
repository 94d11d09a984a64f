"""The gate: may this model take the champion's place? Yes, no, or not to be told from these items.

Every comparison is of the same items, by the paired bootstrap. All of it is in docs/evaluation.md.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from forge.core.recipe import GateRecipe
from tasks.evaluate.score import Judged
from tasks.evaluate.statistics import (
    CONFIDENCE,
    Interval,
    bootstrap,
    holm,
    items_to_decide,
    resampled_means,
    score_interval,
)

Outcome = Literal["pass", "refuse", "inconclusive"]
WORSE = 0.01  # chance at which two equally good models are told apart; for all slices together, the same again


@dataclass(frozen=True)
class Finding:
    """What a rule found: a figure, its bounds where it has some, and the threshold; `says` is all of it in one line."""

    rule: str
    outcome: Outcome
    estimate: float
    low: float | None
    high: float | None
    threshold: float
    items: int
    says: str


@dataclass(frozen=True)
class Verdict:
    """The outcome of all rules: the worst of theirs. `reason` is one line."""

    outcome: Outcome
    reason: str
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """The verdict as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """What the candidate is compared with: the champion, or, where there is none yet, what it was trained from."""

    name: Literal["champion", "base"]
    judged: Judged


def decide(
    candidate: Judged, reference: Reference | None, slices: Mapping[str, np.ndarray], recipe: GateRecipe
) -> Verdict:
    """The verdict on a candidate; `slices` has the places of each slice's items.

    Without a reference the candidate is the champion itself, and only the rules about it alone apply.
    """
    findings = [*_alone(candidate, recipe)]
    if reference is None:
        same = "this model is the champion already"
        findings.append(Finding("champion", "pass", 0.0, None, None, 0.0, len(candidate.answers), same))
    else:
        findings += _against(candidate, reference, slices, recipe)
    for outcome, what in (("refuse", "refused"), ("inconclusive", "inconclusive")):
        worst = [finding for finding in findings if finding.outcome == outcome]
        if worst:
            worst.sort(
                key=lambda finding: finding.rule not in ("champion", "base") or not finding.items
            )  # what tells most
            others = len(worst) - 1
            more = f" (and by {others} other rule{'s' * (others > 1)})" if others else ""
            return Verdict(outcome, f"{what} by {worst[0].rule}: {worst[0].says}{more}", tuple(findings))  # type: ignore[arg-type]
    return Verdict(
        "pass", f"passed: {findings[-1].says if reference is None else _main(findings).says}", tuple(findings)
    )


def _main(findings: list[Finding]) -> Finding:
    return next(finding for finding in findings if finding.rule in ("champion", "base"))


def _alone(candidate: Judged, recipe: GateRecipe) -> list[Finding]:
    """Rules about the candidate alone."""
    items = len(candidate.answers)
    findings = []

    def rule(name: str, good: bool, otherwise: Outcome, figure: float, threshold: float, says: str) -> None:
        outcome: Outcome = "pass" if good else otherwise
        findings.append(Finding(name, outcome, figure, None, None, threshold, items, says))

    rule("items", items >= recipe.min_items, "inconclusive", items, recipe.min_items,
         f"{items} items; gate.min_items is {recipe.min_items}")  # fmt: skip
    finite = int(np.isfinite(candidate.nll).sum())
    rule("finite", finite == items, "refuse", finite / items, 1.0,
         f"{finite} of {items} items have a finite likelihood")  # fmt: skip
    ended = sum(answer.ended for answer in candidate.answers) / items
    rule("ended", ended >= recipe.min_finished, "refuse", ended, recipe.min_finished,
         f"{ended:.1%} of the answers came to their end within evaluation.max_new_tokens; gate.min_finished is "
         f"{recipe.min_finished:.1%}")  # fmt: skip
    expects = ~np.isnan(candidate.valid)
    if expects.any():
        valid = float(candidate.valid[expects].mean())
        rule("valid JSON", valid >= recipe.min_json_validity, "refuse", valid, recipe.min_json_validity,
             f"{valid:.1%} of the answers are valid JSON where it is expected; gate.min_json_validity is "
             f"{recipe.min_json_validity:.1%}")  # fmt: skip
    if recipe.min_score:
        findings.append(_floor(candidate.score, recipe.min_score))
    return findings


def _floor(score: np.ndarray, floor: float) -> Finding:
    """The mean score reaches a floor: Wilson's bounds where items are right or wrong, else the bootstrap's."""
    found = score_interval(score)
    outcome: Outcome = "pass" if found.low >= floor else "refuse" if found.high < floor else "inconclusive"
    says = f"score {found.estimate:.1%} (95% bounds {found.low:.1%} to {found.high:.1%}); gate.min_score is {floor:.1%}"
    return Finding("floor", outcome, found.estimate, found.low, found.high, floor, len(score), says)


def _against(
    candidate: Judged, reference: Reference, slices: Mapping[str, np.ndarray], recipe: GateRecipe
) -> list[Finding]:
    """Rules about the candidate beside the reference."""
    new, old = measured(candidate, recipe), measured(reference.judged, recipe)
    paired = np.isfinite(new) & np.isfinite(old)
    if recipe.metric == "nll" and _counts(candidate) != _counts(reference.judged):
        why = "their tokenizers differ, and so do nats a token; set gate.metric to score"
        return [Finding(reference.name, "inconclusive", math.nan, None, None, 0.0, 0, why)]
    if paired.sum() < min(recipe.min_items, len(paired)):  # too few items in all is another rule's
        why = f"{paired.sum()} items have figures of both; gate.min_items is {recipe.min_items}"
        return [Finding(reference.name, "inconclusive", math.nan, None, None, 0.0, int(paired.sum()), why)]
    improve = reference.name == "base" or recipe.require_improvement
    whole = Comparison(new[paired], old[paired])
    findings = [
        whole.finding(reference.name, recipe, None if improve else recipe.non_inferiority_margin, whole.worse <= WORSE)
    ]
    parts = {}
    for name, places in slices.items():
        judged = places[paired[places]]
        if len(judged) >= recipe.min_slice_items:
            parts[name] = Comparison(new[judged], old[judged])
    worse = holm([part.worse for part in parts.values()], WORSE)
    for (name, part), is_worse in zip(parts.items(), worse, strict=True):
        findings.append(part.finding(f"slice {name}", recipe, recipe.slice_margin, is_worse))
    return findings


def measured(judged: Judged, recipe: GateRecipe) -> np.ndarray:
    """What models are compared by, an entry an item: the higher the better."""
    return judged.score if recipe.metric == "score" else -judged.nll


def _counts(judged: Judged) -> list[int]:
    """How many tokens each item's expected answers are to a model."""
    return [answer.nll_tokens for answer in judged.answers]


class Comparison:
    """Two models' figures for the same items, shape [items]: the new one's and the old one's, the higher the better."""

    def __init__(self, new: np.ndarray, old: np.ndarray) -> None:
        self.new, self.old = new, old
        self.difference = new - old
        self.means = resampled_means(self.difference)
        self.interval: Interval = bootstrap(self.difference, CONFIDENCE, self.means)
        self.worse = float((np.count_nonzero(self.means >= 0) + 1) / (len(self.means) + 1))  # p-value

    def finding(self, rule: str, recipe: GateRecipe, margin: float | None, is_worse: bool) -> Finding:
        """Whether the new one is better (no margin), or at least no worse than by a margin, and not plainly worse."""
        found, threshold = self.interval, 0.0 if margin is None else -margin
        nothing_differs = not self.difference.any() and not rule.startswith("slice")
        outcome: Outcome
        if is_worse:
            outcome, why = "refuse", "it is worse, and not by chance"
        elif nothing_differs:
            other = " (or set gate.metric to nll)" if recipe.metric == "score" else ""
            why = f"the same on every item, which tells nothing of either; ask what tells models apart{other}"
            outcome = "inconclusive"
        elif found.low > threshold:
            outcome, why = "pass", "it is better" if margin is None else f"no worse than by {_gap(margin, recipe)}"
        else:
            outcome, why = "inconclusive", self._undecided(recipe, margin)
        sign = 1 if recipe.metric == "score" else -1
        ours, theirs = sign * float(self.new.mean()), sign * float(self.old.mean())
        what = {"score": "score", "nll": "NLL"}[recipe.metric]
        ends = sorted((sign * found.low, sign * found.high))
        says = (
            f"{what} {_number(ours, recipe)} against {_number(theirs, recipe)}, difference "
            f"{_gap(sign * found.estimate, recipe, '+')} (95% bounds {_gap(ends[0], recipe, '+', '')} to "
            f"{_gap(ends[1], recipe, '+', '')}) on {len(self.new)} items: {why}"
        )
        return Finding(rule, outcome, found.estimate, found.low, found.high, threshold, len(self.new), says)

    def _undecided(self, recipe: GateRecipe, margin: float | None) -> str:
        """What would decide."""
        deviation, shift = float(self.difference.std(ddof=1)), self.interval.estimate
        if margin is None:
            wanted = items_to_decide(deviation, shift) if shift > 0 else None
            asked = "that it is better is not shown"
        else:
            wanted = items_to_decide(deviation, margin)
            if wanted <= len(self.new):  # it would be decided, if they were equally good
                wanted = items_to_decide(deviation, margin + shift) if margin + shift > 0 else None
            asked = f"that it is no worse than by {_gap(margin, recipe)} is not shown"
        return asked + (f"; about {wanted:,} items would decide" if wanted else "")


def _number(value: float, recipe: GateRecipe) -> str:
    return f"{value:.1%}" if recipe.metric == "score" else f"{value:.4f}"


def _gap(value: float, recipe: GateRecipe, sign: str = "", unit: str = " points") -> str:
    return f"{100 * value:{sign}.1f}{unit}" if recipe.metric == "score" else f"{value:{sign}.4f}"
