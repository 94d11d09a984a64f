"""Fuzzing: a few fixed examples in the suite, and others for as many minutes as FORGE_TEST_FUZZ_MINUTES says."""

import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

MINUTES = float(os.environ.get("FORGE_TEST_FUZZ_MINUTES", "0"))
BATCH = 1000  # examples, when fuzzing for minutes
ABSENT = object()


def fuzz(check: Callable[[Any], None], examples: st.SearchStrategy[Any], few: int) -> None:
    """Check the few examples of the suite, or other ones for MINUTES. The same seeds give the same examples."""
    checked = 0

    def one(example: Any) -> None:
        nonlocal checked
        checked += 1
        check(example)

    end = time.monotonic() + 60 * MINUTES
    phases = (Phase.generate, Phase.shrink)
    options = settings(
        max_examples=BATCH if MINUTES else few,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    for number in count():
        seed(number)(options(given(examples)(one)))()
        if time.monotonic() >= end:
            break
    print(f"{checked} examples")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def changed(value: Any, place: int, replacement: Any) -> Any:
    """A copy of a value with another one at a place, counted from 0 and round again; ABSENT removes what is there."""
    paths = list(places(value))
    return _changed(value, paths[place % len(paths)], replacement) if paths else value


def _changed(value: Any, path: tuple[Any, ...], replacement: Any) -> Any:
    if not path:
        return replacement
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    entries = [(key, _changed(entry, path[1:], replacement) if key == path[0] else entry) for key, entry in pairs]
    kept = [(key, entry) for key, entry in entries if entry is not ABSENT]
    return dict(kept) if isinstance(value, dict) else [entry for _, entry in kept]


def cut_or_spliced(data: bytes, at: int, size: int, new: bytes) -> bytes:
    """The data with `size` bytes from a place, counted round again, replaced by others."""
    at %= len(data) + 1
    return data[:at] + new + data[at + size :]
