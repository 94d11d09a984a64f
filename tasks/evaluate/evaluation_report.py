"""The evaluation report: one self-contained HTML page, with the verdict first, in light and dark colours."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forge.core.recipe import GateRecipe
from tasks.evaluate.gate import Verdict, metric_values
from tasks.evaluate.items import Item
from tasks.evaluate.score import Judged, Scores, speed_of
from tasks.evaluate.statistics import CONFIDENCE, Interval, score_interval

REGRESSIONS, SAMPLES = 20, 12
INK = "#7a7a7a"  # replaced by the page's own text colour
COLOURS = {"base": "#9aa5b1", "champion": "#d98a1f", "candidate": "#2f7ed8"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "forge",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Page:
    """The contents of a report.

    `judged` and `scores` have an entry for candidate, base and (if compared) champion. `reference` is the model that
    the candidate was compared with, "" if it is the champion itself. `slices` has the indices of each slice's items.
    """

    name: str
    items: Sequence[Item]
    judged: Mapping[str, Judged]
    scores: Mapping[str, Scores]
    slices: Mapping[str, np.ndarray]
    verdict: Verdict
    gate: GateRecipe
    reference: str
    champion: str
    harness: Mapping[str, float]
    training: Mapping[str, Any]
    lineage: Mapping[str, str]

    @property
    def models(self) -> list[str]:
        """The models, the oldest first."""
        return [who for who in COLOURS if who in self.judged]

    def interval(self, who: str, indices: np.ndarray | None = None) -> Interval:
        """A model's mean score with its bounds, on the given items or all."""
        score = self.judged[who].score
        return score_interval(score if indices is None else score[indices])

    def regressions(self) -> list[tuple[Item, int]]:
        """The items on which the candidate is worst compared with the reference, with their indices; ties by NLL."""
        if not self.reference:
            return []
        new, old = self.judged["candidate"], self.judged[self.reference]
        change = metric_values(new, self.gate) - metric_values(old, self.gate)
        nll_change = np.nan_to_num(new.nll - old.nll, nan=np.inf)
        order = sorted(np.flatnonzero(change < 0).tolist(), key=lambda at: (change[at], -nll_change[at]))
        return [(self.items[at], at) for at in order[:REGRESSIONS]]

    def samples(self) -> list[tuple[Item, int]]:
        """Some items with their indices, wrong answers first."""
        order = np.argsort(self.judged["candidate"].score, kind="stable")[:SAMPLES].tolist()
        return [(self.items[at], at) for at in order]


def render_evaluation_report(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.j2").render(
        page=page,
        verdict=page.verdict,
        models=page.models,
        speed={who: speed_of(of) for who, of in page.judged.items()},
        score_plot=plot_scores(page),
        loss_plot=plot_loss(page.training["curve"]),
        slice_plot=plot_slices(page) if len(page.slices) > 1 else "",
        confidence=f"{CONFIDENCE:.0%}",
    )


def plot_scores(page: Page) -> str:
    """Each model's mean score with its bounds, as SVG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.8 + 0.45 * len(page.models)))
        axes = figure.subplots()
        for row, who in enumerate(page.models):
            _plot_interval(axes, page.interval(who), row, who)
        axes.set_yticks(range(len(page.models)), page.models)
        axes.set(xlabel="score (%)", xlim=(-2, 102), ylim=(-0.6, len(page.models) - 0.4))
        return _svg(figure)


def plot_slices(page: Page) -> str:
    """Each model's mean score by slice with its bounds, as SVG."""
    names = list(page.slices)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.2 * (len(page.models) + 0.6) * len(names)))
        axes = figure.subplots()
        for row, name in enumerate(reversed(names)):
            for at, who in enumerate(page.models):
                height = row + (at - (len(page.models) - 1) / 2) * 0.24
                _plot_interval(axes, page.interval(who, page.slices[name]), height, who, who if row == 0 else None)
        axes.set_yticks(range(len(names)), [_short(name) for name in reversed(names)])
        axes.set(xlabel="score (%)", xlim=(-2, 102), ylim=(-0.6, len(names) - 0.4))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        return _svg(figure)


def _plot_interval(axes: Axes, interval: Interval, height: float, who: str, label: str | None = None) -> None:
    bounds = [100 * interval.low, 100 * interval.high]
    axes.plot(bounds, [height, height], color=COLOURS[who], linewidth=2.5, alpha=0.55)
    axes.plot([100 * interval.estimate], [height], "o", color=COLOURS[who], markersize=6, label=label)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def plot_loss(curve: Sequence[Mapping[str, float]]) -> str:
    """Training and held-out loss by step, as SVG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3))
        axes = figure.subplots()
        axes.plot([p["step"] for p in curve], [p["loss"] for p in curve], color=COLOURS["base"], label="training")
        heldout = [p for p in curve if "heldout_loss" in p]
        steps, losses = [p["step"] for p in heldout], [p["heldout_loss"] for p in heldout]
        axes.plot(steps, losses, color=COLOURS["candidate"], marker="o", label="held out")
        axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.legend()
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """A figure as an SVG element in the page's text colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
