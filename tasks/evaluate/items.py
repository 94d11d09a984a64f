"""Evaluation items: held-out conversations up to their last answer, and how that answer is scored."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge.core.digest import digest_json
from forge.core.recipe import Check
from forge.models.chat_format import has_scorable_answer


@dataclass(frozen=True)
class Item:
    """A held-out conversation: the `messages` before its last assistant turn, that turn, and the `tools` it may use."""

    messages: list[dict[str, Any]]
    expected: str
    slice: str
    check: Check
    tools: list[dict[str, Any]] | None = None
    untrained: tuple[int, ...] = ()  # indices of earlier assistant messages that are only read

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All messages, including the expected answer."""
        return [*self.messages, {"role": "assistant", "content": self.expected}]

    @property
    def question(self) -> str:
        """The last message before the answer."""
        return str(self.messages[-1]["content"])


def read_items(path: Path, most: int, check: Check | None) -> tuple[list[Item], int]:
    """The first `most` held-out conversations, and how many rows were skipped to find them.

    Rows are stored in the order of their digests, so the first ones are a random sample. `check` applies to rows that
    have none; if it is None, answers in JSON are compared as JSON and others exactly. Plain texts are skipped, and so
    are answers with tool calls or reasoning_content, which no check can score, and those that are not to be learned.
    """
    items: list[Item] = []
    skipped = 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            untrained = tuple(row.get("untrained", ()))
            if not has_scorable_answer(row.get("messages", ()), untrained):
                skipped += 1
                continue
            *messages, last = row["messages"]
            item_check = (
                Check.model_validate(row["check"]) if "check" in row else check or default_check(last["content"])
            )
            items.append(Item(messages, last["content"], row["slice"], item_check, row.get("tools"), untrained))
            if len(items) == most:
                break
    return items, skipped


def default_check(expected: str) -> Check:
    """The check for a row and a recipe that set none."""
    return Check(kind="json" if is_json(expected) else "exact")


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or array."""
    return isinstance(parse_json(text), dict | list)


def parse_json(text: str) -> Any:
    """A text's JSON value, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def digest_items(items: list[Item]) -> str:
    """Digest of the items, including how they are scored."""
    return digest_json([{**asdict(item), "check": item.check.model_dump()} for item in items])
