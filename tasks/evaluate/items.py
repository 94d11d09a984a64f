"""What models are asked: held-out conversations, each up to its last answer, and how that answer is judged."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge.core.digest import digest_json
from forge.core.recipe import Check


@dataclass(frozen=True)
class Item:
    """A held-out conversation: `messages` up to the last assistant turn, the `tools` it may call, and that turn."""

    messages: list[dict[str, Any]]
    expected: str
    slice: str
    check: Check
    tools: list[dict[str, Any]] | None = None

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All messages, the expected answer included."""
        return [*self.messages, {"role": "assistant", "content": self.expected}]

    @property
    def question(self) -> str:
        """What was said last before the answer."""
        return str(self.messages[-1]["content"])


def read_items(path: Path, most: int, check: Check | None) -> tuple[list[Item], int]:
    """The first held-out conversations, and how many rows before the last of them were passed over.

    Rows are stored in the order of their digests, so the first are a fair draw. `check` is that of rows without one of
    their own; None is json where JSON is expected, and else exact. Plain texts are passed over, and answers that are a
    tool call or hold reasoning apart: no check says anything of them.
    """
    items: list[Item] = []
    passed_over = 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            *messages, last = row.get("messages") or [{}]
            if not messages or set(last) != {"role", "content"}:
                passed_over += 1
                continue
            judged = Check.model_validate(row["check"]) if "check" in row else check or default_check(last["content"])
            items.append(Item(messages, last["content"], row["slice"], judged, row.get("tools")))
            if len(items) == most:
                break
    return items, passed_over


def default_check(expected: str) -> Check:
    """How an answer is judged where nobody said."""
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
    """Identity of what is asked, and of how it is judged."""
    return digest_json([{**asdict(item), "check": item.check.model_dump()} for item in items])
