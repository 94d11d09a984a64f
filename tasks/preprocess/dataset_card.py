"""The card of a data set: its statistics, which its digest covers, and the lines that are logged about it."""

import hashlib
from typing import Any

import numpy as np

from forge.core.recipe import DataRecipe
from forge.models.chat_format import ChatFormat
from tasks.preprocess.messages import ROLES
from tasks.preprocess.read import SourcePart
from tasks.preprocess.select import Selection


def dataset_statistics(
    part: SourcePart, chosen: Selection, packed: dict[str, int], data: DataRecipe, form: ChatFormat
) -> dict[str, Any]:
    """The part of the card that the digest covers. It says nothing about where the rows came from.

    `packed` is the number of packed rows of each side of the split.
    """
    sides = {"train": chosen.train, "heldout": chosen.heldout}
    tokens = {name: int(side["length"].sum(dtype=np.int64)) for name, side in sides.items()}
    return {
        "context": data.max_seq_len,
        "rows": part.rows,
        "rejected": part.rejected,
        "removed": chosen.removed,
        "ignored_columns": part.ignored,
        "turns": part.turns,
        "end_tokens": sorted(part.ends),
        "documents": {name: len(side) for name, side in sides.items()},
        "tokens": tokens,
        "tokens_dropped": int(sum(side["cut"].sum(dtype=np.int64) for side in sides.values())),
        "documents_cut": int(sum(np.count_nonzero(side["cut"]) for side in sides.values())),
        "trained_tokens": {name: int(side["trained"].sum(dtype=np.int64)) for name, side in sides.items()},
        "packed_rows": packed,
        "packing_efficiency": {name: round(tokens[name] / (packed[name] * data.max_seq_len), 5) for name in sides},
        "lengths": {name: _histogram(side["length"], data.max_seq_len) for name, side in sides.items()},
        "roles": {
            role: int(sum(side["roles"][:, at].sum() for side in sides.values())) for at, role in enumerate(ROLES)
        },
        "slices": {
            name: dict(largest_first(_counted(side["slice"], part.slices))) for name, side in sides.items()
        },
        "split": _split(data),
        "template_digest": form.template_digest,
        "tokenizer_digest": hashlib.sha256(form.tokenizer.encode()).hexdigest(),
    }  # fmt: skip


# These words are part of the digest.
def _split(data: DataRecipe) -> dict[str, Any]:
    if data.heldout_source:
        return {"by": "a file of its own"}
    by = f"hash of {data.group_column}, or of the first question"
    return {"by": by, "heldout_fraction": data.heldout_fraction}


def _counted(numbers: np.ndarray, names: list[str]) -> dict[str, int]:
    counts = np.bincount(numbers, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def largest_first(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Names and counts, sorted by count and then by name."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def _histogram(lengths: np.ndarray, context: int) -> list[dict[str, int]]:
    """Documents and tokens by length, in bins whose upper edge (`to`) doubles."""
    edges = [min(16 << bin, context) for bin in range(32) if bin == 0 or 16 << (bin - 1) < context]
    bins = np.searchsorted(edges, lengths)
    documents = np.bincount(bins, minlength=len(edges))
    tokens = np.bincount(bins, weights=lengths, minlength=len(edges))
    table = zip(edges, documents.tolist(), tokens.tolist(), strict=True)
    return [{"to": to, "documents": count, "tokens": int(inside)} for to, count, inside in table]


def dataset_messages(card: dict[str, Any]) -> list[str]:
    """What the user reads at the end: what was used and what was not."""
    documents, efficiency = card["documents"], card["packing_efficiency"]
    lines = [f"row format {row_format}" for row_format in card["source"]["shapes"]]
    for what in ("rejected", "removed"):
        if card[what]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in largest_first(card[what]))
            lines.append(f"{sum(card[what].values()):,} {what}: {reasons}")
    if card["documents_cut"]:
        lines.append(f"{card['documents_cut']:,} truncated: {card['tokens_dropped']:,} tokens dropped")
    lines += [f"{count:,} messages {reason}" for reason, count in largest_first(card["turns"])]
    if card["ignored_columns"]:
        lines.append(f"columns ignored: {', '.join(card['ignored_columns'])}")
    lines.append(
        f"{documents['train']:,} training documents, {documents['heldout']:,} held out, packed into "
        f"{card['packed_rows']['train']:,} rows of {card['context']} tokens ({efficiency['train']:.1%} full)"
    )
    return lines
