"""The gate: may a candidate become the champion? It answers passed, rejected or inconclusive.

The main rule tests non-inferiority: a candidate passes if it is shown to be not worse than the champion by more than a
margin, and is rejected if it is significantly worse at all. Models are compared on the same items, with the paired
bootstrap. See docs/evaluation.md.
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
    bootstrap_interval,
    holm_rejections,
    non_inferiority_sample_size,
    resampled_means,
    score_interval,
)

Outcome = Literal["passed", "rejected", "inconclusive"]
REFERENCES = ("champion", "base")  # the names of the rule about all items
SIGNIFICANCE = 0.01  # chance of rejecting an equally good model; the same for all slices together


@dataclass(frozen=True)
class Finding:
    """The result of one rule: an estimate with bounds (if any) and threshold; `detail` is all of it as one line."""

    rule: str
    outcome: Outcome
    estimate: float
    low: float | None
    high: float | None
    threshold: float
    items: int
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The worst outcome of all rules. `reason` is one line."""

    outcome: Outcome
    reason: str
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """The verdict as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """The model that the candidate is compared with: the champion, or the base model if there is no champion yet."""

    name: Literal["champion", "base"]
    judged: Judged


def decide(
    candidate: Judged, reference: Reference | None, slices: Mapping[str, np.ndarray], recipe: GateRecipe
) -> Verdict:
    """The verdict on a candidate; `slices` has the indices of each slice's items.

    Without a reference the candidate is the champion itself, and only the rules about the candidate alone apply.
    """
    findings = _candidate_rules(candidate, recipe)
    if reference is None:
        detail = "this model is already the champion"
        findings.append(Finding("champion", "passed", 0.0, None, None, 0.0, len(candidate.answers), detail))
    else:
        findings += _comparison_rules(candidate, reference, slices, recipe)
    return _verdict(findings)


def _verdict(findings: list[Finding]) -> Verdict:
    worst: tuple[Outcome, ...] = ("rejected", "inconclusive")
    for outcome in worst:
        failed = [finding for finding in findings if finding.outcome == outcome]
        if failed:
            # The comparison of all items says most, unless it had no items.
            lead = min(failed, key=lambda finding: finding.rule not in REFERENCES or not finding.items)
            others = len(failed) - 1
            more = f" (and by {others} other rule{'s' * (others > 1)})" if others else ""
            return Verdict(outcome, f"{outcome} by {lead.rule}: {lead.detail}{more}", tuple(findings))
    lead = next(finding for finding in findings if finding.rule in REFERENCES)
    return Verdict("passed", f"passed: {lead.detail}", tuple(findings))


def _candidate_rules(candidate: Judged, recipe: GateRecipe) -> list[Finding]:
    """The rules about the candidate alone."""
    items = len(candidate.answers)
    findings = []

    def rule(name: str, holds: bool, otherwise: Outcome, estimate: float, threshold: float, detail: str) -> None:
        outcome: Outcome = "passed" if holds else otherwise
        findings.append(Finding(name, outcome, estimate, None, None, threshold, items, detail))

    rule("items", items >= recipe.min_items, "inconclusive", items, recipe.min_items,
         f"{items} items; gate.min_items is {recipe.min_items}")  # fmt: skip
    finite = int(np.isfinite(candidate.nll).sum())
    rule("finite", finite == items, "rejected", finite / items, 1.0,
         f"{finite} of {items} items have a finite likelihood")  # fmt: skip
    finished = sum(answer.ended for answer in candidate.answers) / items
    rule("finished", finished >= recipe.min_finished, "rejected", finished, recipe.min_finished,
         f"{finished:.1%} of the answers ended within evaluation.max_new_tokens; gate.min_finished is "
         f"{recipe.min_finished:.1%}")  # fmt: skip
    expects_json = ~np.isnan(candidate.valid)
    if expects_json.any():
        valid = float(candidate.valid[expects_json].mean())
        rule("valid JSON", valid >= recipe.min_json_validity, "rejected", valid, recipe.min_json_validity,
             f"{valid:.1%} of the answers are valid JSON where JSON is expected; gate.min_json_validity is "
             f"{recipe.min_json_validity:.1%}")  # fmt: skip
    if recipe.min_score:
        findings.append(_min_score_rule(candidate.score, recipe.min_score))
    return findings


def _min_score_rule(score: np.ndarray, threshold: float) -> Finding:
    interval = score_interval(score)
    outcome: Outcome = (
        "passed" if interval.low >= threshold else "rejected" if interval.high < threshold else "inconclusive"
    )
    detail = (
        f"score {interval.estimate:.1%} (95% bounds {interval.low:.1%} to {interval.high:.1%}); gate.min_score is "
        f"{threshold:.1%}"
    )
    return Finding("min_score", outcome, interval.estimate, interval.low, interval.high, threshold, len(score), detail)


def _comparison_rules(
    candidate: Judged, reference: Reference, slices: Mapping[str, np.ndarray], recipe: GateRecipe
) -> list[Finding]:
    """The rules that compare the candidate with the reference: on all items, and on each slice."""
    new, old = metric_values(candidate, recipe), metric_values(reference.judged, recipe)
    paired = np.isfinite(new) & np.isfinite(old)
    pairs = int(paired.sum())
    if recipe.metric == "nll" and _token_counts(candidate) != _token_counts(reference.judged):
        return [_no_comparison(reference, 0, "the models' tokenizers differ, so nats per token cannot be compared; set "
                               "gate.metric to score")]  # fmt: skip
    if pairs < min(recipe.min_items, len(paired)):  # too few items in total fail the rule items
        detail = f"{pairs} items have values from both models; gate.min_items is {recipe.min_items}"
        return [_no_comparison(reference, pairs, detail)]
    superiority = reference.name == "base" or recipe.require_improvement
    whole = PairedComparison(new[paired], old[paired])
    margin = None if superiority else recipe.non_inferiority_margin
    findings = [whole.finding(reference.name, recipe, margin, whole.p_value <= SIGNIFICANCE)]
    parts = {}
    for name, places in slices.items():
        both = places[paired[places]]
        if len(both) >= recipe.min_slice_items:
            parts[name] = PairedComparison(new[both], old[both])
    significant = holm_rejections([part.p_value for part in parts.values()], SIGNIFICANCE)
    for (name, part), is_worse in zip(parts.items(), significant, strict=True):
        findings.append(part.finding(f"slice {name}", recipe, recipe.slice_margin, is_worse))
    return findings


def _no_comparison(reference: Reference, items: int, detail: str) -> Finding:
    return Finding(reference.name, "inconclusive", math.nan, None, None, 0.0, items, detail)


def metric_values(judged: Judged, recipe: GateRecipe) -> np.ndarray:
    """A model's value of gate.metric for each item, shape [items]; higher is better."""
    return judged.score if recipe.metric == "score" else -judged.nll


def _token_counts(judged: Judged) -> list[int]:
    return [answer.nll_tokens for answer in judged.answers]


class PairedComparison:
    """Two models' values for the same items, higher is better, shape [items]: the candidate's, and the reference's.

    `p_value` is that of the null hypothesis that the candidate is not worse, by the bootstrap.
    """

    def __init__(self, new: np.ndarray, old: np.ndarray) -> None:
        self.new, self.old = new, old
        self.difference = new - old
        means = resampled_means(self.difference)
        self.interval: Interval = bootstrap_interval(self.difference, CONFIDENCE, means)
        self.p_value = float((np.count_nonzero(means >= 0) + 1) / (len(means) + 1))

    def finding(self, rule: str, recipe: GateRecipe, margin: float | None, is_worse: bool) -> Finding:
        """Test non-inferiority within a margin, or superiority if the margin is None.

        The candidate is rejected if it is significantly worse, even within the margin.
        """
        low, high = self.interval.low, self.interval.high
        threshold = 0.0 if margin is None else -margin
        outcome, conclusion = self._test(rule, recipe, margin, is_worse)
        detail = f"{self._figures(recipe)} on {len(self.new)} items: {conclusion}"
        return Finding(rule, outcome, self.interval.estimate, low, high, threshold, len(self.new), detail)

    def _test(self, rule: str, recipe: GateRecipe, margin: float | None, is_worse: bool) -> tuple[Outcome, str]:
        if is_worse:
            return "rejected", "significantly worse"
        if rule in REFERENCES and not self.difference.any():
            other = " (or set gate.metric to nll)" if recipe.metric == "score" else ""
            return "inconclusive", (
                f"equal on every item, which shows nothing about either model; use items that tell models apart{other}"
            )
        if margin is None:
            return ("passed", "better") if self.interval.low > 0 else ("inconclusive", self._undecided(recipe, None))
        if self.interval.low > -margin:
            return "passed", f"non-inferior within a margin of {_gap(margin, recipe)}"
        return "inconclusive", self._undecided(recipe, margin)

    def _figures(self, recipe: GateRecipe) -> str:
        """Both means, and their difference with its bounds, in the direction of the metric (a lower NLL is better)."""
        sign = 1 if recipe.metric == "score" else -1
        name = {"score": "score", "nll": "NLL"}[recipe.metric]
        new, old = sign * float(self.new.mean()), sign * float(self.old.mean())
        low, high = sorted((sign * self.interval.low, sign * self.interval.high))
        return (
            f"{name} {_number(new, recipe)} against {_number(old, recipe)}, difference "
            f"{_gap(sign * self.interval.estimate, recipe, '+')} (95% bounds {_gap(low, recipe, '+', '')} to "
            f"{_gap(high, recipe, '+', '')})"
        )

    def _undecided(self, recipe: GateRecipe, margin: float | None) -> str:
        """What was not shown, and about how many items would decide."""
        deviation, shift = float(self.difference.std(ddof=1)), self.interval.estimate
        if margin is None:
            items = non_inferiority_sample_size(deviation, shift) if shift > 0 else None
            open_question = "not shown to be better"
        else:
            items = non_inferiority_sample_size(deviation, margin)
            if items <= len(self.new):  # enough if the models were equally good, so use the observed difference
                items = non_inferiority_sample_size(deviation, margin + shift) if margin + shift > 0 else None
            open_question = f"not shown to be non-inferior within a margin of {_gap(margin, recipe)}"
        return open_question + (f"; about {items:,} items would decide" if items else "")


def _number(value: float, recipe: GateRecipe) -> str:
    return f"{value:.1%}" if recipe.metric == "score" else f"{value:.4f}"


def _gap(value: float, recipe: GateRecipe, sign: str = "", unit: str = " points") -> str:
    return f"{100 * value:{sign}.1f}{unit}" if recipe.metric == "score" else f"{value:{sign}.4f}"
