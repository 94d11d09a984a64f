"""The score of an answer, by the kind of its check, and the mean scores of a model."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rapidfuzz.distance import LCSseq

from forge.core.recipe import Check
from tasks.evaluate.items import Item, is_json, parse_json

if TYPE_CHECKING:
    from tasks.evaluate.answer import Answer

# Words, or characters in scripts without spaces between words (Han, kana, Thai to Khmer).
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0eff\u1780-\u17ff]|\w+?(?=[\u3040-\u30ff"
                   r"\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0eff\u1780-\u17ff]|\W|$)")  # fmt: skip
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def judge(check: Check, expected: str, answer: str) -> float:
    """An answer's score in [0, 1]; leading and trailing white space is ignored."""
    return KINDS[check.kind](check, expected.strip(), answer.strip())


def _exact(check: Check, expected: str, answer: str) -> float:
    return float(answer == expected)


def _normalised(check: Check, expected: str, answer: str) -> float:
    return float(normalise(answer) == normalise(expected))


def normalise(text: str) -> str:
    """A text with case folded, NFKC forms, no punctuation, and single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if not unicodedata.category(c).startswith("P") else " " for c in folded).split())


def _json(check: Check, expected: str, answer: str) -> float:
    """The share of all fields that the expected and the given JSON have in common, with equal values."""
    if not is_json(answer):
        return 0.0
    right, given = dict(fields(parse_json(expected))), dict(fields(parse_json(answer)))
    return sum(given.get(name, _MISSING) == value for name, value in right.items()) / len(right.keys() | given.keys())


_MISSING = object()


def fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The leaves of a JSON value with their paths. True differs from 1, and an empty object or list is a leaf."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from fields(part, (*path, key))
    elif isinstance(value, list) and value:
        for at, part in enumerate(value):
            yield from fields(part, (*path, at))
    else:
        yield path, (type(value) is bool, str(value) if isinstance(value, dict | list) else value)


def _regex(check: Check, expected: str, answer: str) -> float:
    return float(re.search(check.pattern, answer) is not None)


def _number(check: Check, expected: str, answer: str) -> float:
    right, given = last_number(expected), last_number(answer)
    if right is None or given is None:
        return 0.0
    return float(math.isclose(given, right, rel_tol=0, abs_tol=abs(right) * check.tolerance + 1e-12))


def last_number(text: str) -> float | None:
    """The last number of a text, with commas as digit separators; None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _rouge(check: Check, expected: str, answer: str) -> float:
    """ROUGE-L F1 over words (Lin 2004, https://aclanthology.org/W04-1013)."""
    right, given = WORDS.findall(normalise(expected)), WORDS.findall(normalise(answer))
    common = LCSseq.similarity(right, given)
    return 2 * common / (len(right) + len(given)) if right or given else 1.0


KINDS: dict[str, Callable[[Check, str, str], float]] = {
    "exact": _exact,
    "normalised": _normalised,
    "json": _json,
    "regex": _regex,
    "number": _number,
    "rouge": _rouge,
}


@dataclass(frozen=True)
class Judged:
    """One model's answers and their scores, one entry per item; `nll` is in nats per token.

    `valid` is 1 if the answer is JSON, 0 if it is not, and NaN if no JSON is expected.
    """

    answers: "list[Answer]"
    score: np.ndarray
    exact: np.ndarray
    valid: np.ndarray
    nll: np.ndarray

    def part(self, at: np.ndarray) -> "Judged":
        """The items at these indices."""
        answers = [self.answers[index] for index in at]
        return Judged(answers, self.score[at], self.exact[at], self.valid[at], self.nll[at])


def judge_all(items: Sequence[Item], answers: "Sequence[Answer]") -> Judged:
    """Score a model's answers to items."""
    pairs = list(zip(items, answers, strict=True))
    return Judged(
        list(answers),
        np.array([judge(item.check, item.expected, answer.text) for item, answer in pairs]),
        np.array([float(answer.text.strip() == item.expected.strip()) for item, answer in pairs]),
        np.array([float(is_json(answer.text)) if is_json(item.expected) else np.nan for item, answer in pairs]),
        np.array([answer.nll / answer.nll_tokens for answer in answers]),
    )


@dataclass(frozen=True)
class Scores:
    """Mean scores over items, in [0, 1]; `nll` is the mean over items of nats per token, `perplexity` is over tokens.

    `json_validity` is None if no item expects JSON, and `sampled_score` if no answers were sampled.
    """

    items: int
    score: float
    exact_match: float
    json_validity: float | None
    nll: float
    perplexity: float
    ended: float
    sampled_score: float | None


def summarise(items: Sequence[Item], judged: Judged) -> Scores:
    """The mean scores over at least one item."""
    answers = judged.answers
    expects_json = ~np.isnan(judged.valid)
    drawn = [judge(i.check, i.expected, text) for i, a in zip(items, answers, strict=True) for text in a.samples]
    nats, tokens = sum(answer.nll for answer in answers), sum(answer.nll_tokens for answer in answers)
    return Scores(
        items=len(items),
        score=float(judged.score.mean()),
        exact_match=float(judged.exact.mean()),
        json_validity=float(judged.valid[expects_json].mean()) if expects_json.any() else None,
        nll=float(judged.nll.mean()),
        perplexity=math.exp(min(nats / tokens, 700.0)) if math.isfinite(nats) else math.nan,
        ended=sum(answer.ended for answer in answers) / len(answers),
        sampled_score=float(np.mean(drawn)) if drawn else None,
    )


def speed_of(judged: Judged) -> dict[str, float]:
    """Generated tokens per second, and the median and longest latency of a batch (seconds)."""
    waits = sorted(answer.seconds for answer in judged.answers)
    batches = {answer.seconds for answer in judged.answers}  # each item has its batch's time
    return {
        "tokens_per_second": round(sum(answer.tokens for answer in judged.answers) / max(sum(batches), 1e-9), 1),
        "median_seconds": round(waits[len(waits) // 2], 3),
        "longest_seconds": round(waits[-1], 3),
    }


def indices_by_slice(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """The indices of each slice's items, ordered by slice name."""
    names = np.array([item.slice for item in items])
    return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
