"""The report: one self-contained HTML page with the scores, the loss curve and sample answers, for light and dark."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib import rc_context
from matplotlib.figure import Figure

from tasks.evaluate.score import Answer, Item, Scores, summarise

SAMPLES = 12
INK = "#7a7a7a"  # replaced by the page's own text colour
BEFORE, AFTER = "#9aa5b1", "#2f7ed8"
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


def render_report(
    items: Sequence[Item],
    before: Sequence[Answer],
    after: Sequence[Answer],
    slices: Mapping[str, Mapping[str, Scores]],
    training: Mapping[str, Any],
    lineage: Mapping[str, str],
) -> str:
    """The page. `slices` holds the scores by slice of "before" and "after"; `training` is the card of the model."""
    samples = sorted(zip(items, before, after, strict=True), key=lambda sample: sample[2].exact)[:SAMPLES]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.j2").render(
        before=summarise(items, before),
        after=summarise(items, after),
        slices=[(name, slices["before"][name], scores) for name, scores in slices["after"].items()],
        samples=samples,
        loss_plot=plot_loss(training["curve"]),
        slice_plot=plot_slices(slices),
        training=training,
        lineage=lineage,
    )


def plot_loss(curve: Sequence[Mapping[str, float]]) -> str:
    """Training and held-out loss against trained steps, as SVG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3))
        axes = figure.subplots()
        axes.plot([p["step"] for p in curve], [p["loss"] for p in curve], color=BEFORE, label="training")
        heldout = [p for p in curve if "heldout_loss" in p]
        steps, losses = [p["step"] for p in heldout], [p["heldout_loss"] for p in heldout]
        axes.plot(steps, losses, color=AFTER, marker="o", label="held out")
        axes.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.legend()
        return _svg(figure)


def plot_slices(slices: Mapping[str, Mapping[str, Scores]]) -> str:
    """Exact match by slice, before and after training, as SVG."""
    names = list(slices["after"])
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3))
        axes = figure.subplots()
        places = range(len(names))
        for shift, which, colour in ((-0.2, "before", BEFORE), (0.2, "after", AFTER)):
            heights = [100 * slices[which][name].exact_match for name in names]
            axes.bar([place + shift for place in places], heights, width=0.4, color=colour, label=f"{which} training")
        axes.set(ylabel="exact match (%)", ylim=(0, 105))
        axes.set_xticks(list(places), names)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=2)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """A figure as an SVG element that takes the page's text colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
