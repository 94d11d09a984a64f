"""The report of a data set: a self-contained HTML page with its statistics, and rows as the model sees them."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

SAMPLES = 10
SHOWN = 2000  # tokens per sample


def render_dataset_report(card: Mapping[str, Any], dataset: Path, tokenizer: Any) -> str:
    """The report of the data set in a directory, given its card."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.j2").render(
        card=card,
        samples=[runs(tokenizer, *sample) for sample in draw_samples(dataset / "train")],
        largest={
            "lengths": max((bin["documents"] for bin in card["lengths"]["train"]), default=1) or 1,
            "slices": max(card["slices"]["train"].values(), default=1) or 1,
            "roles": max(card["roles"].values(), default=1) or 1,
        },
    )


def draw_samples(train: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and their training mask for random documents of the first shard, drawn with a fixed seed."""
    shard = min(train.iterdir())
    tokens, trained, document = (
        np.load(shard / f"{name}.npy", mmap_mode="r") for name in ("tokens", "trained", "document")
    )
    rng = np.random.default_rng(20)
    samples = []
    for row in rng.permutation(len(tokens))[:SAMPLES]:
        here = document[row] == rng.integers(1, document[row].max(), endpoint=True)
        samples.append((tokens[row][here], trained[row][here]))
    return samples


def runs(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray) -> list[tuple[bool, str]]:
    """A document as text, in pieces that are either trained or not."""
    shown = zip(tokens[:SHOWN], trained[:SHOWN], strict=True)
    pieces = [
        (bool(is_trained), tokenizer.decode([int(token) for token, _ in group]))
        for is_trained, group in groupby(shown, key=lambda pair: pair[1])
    ]
    return [*pieces, (False, " …")] if len(tokens) > SHOWN else pieces
