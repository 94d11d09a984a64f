"""Waiting for the reconciler: until a model is loaded or a name points to it, and until the old state is restored."""

import logging
import time
from collections.abc import Callable

from forge.core.errors import ForgeError
from forge.serving.desired import Actual, Desired, Served, Serving
from forge.serving.targets import Target

log = logging.getLogger(__name__)

POLL = 0.1  # seconds


def wait_for(
    target: Target,
    desired: Desired,
    served: Served,
    reached: Callable[[Actual], bool],
    timeout: float,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Wait until the reconciler's report of this generation of the document satisfies `reached`.

    ForgeError if the model or its base can't be served, or not within `timeout` seconds. `check` can raise an error to
    end the wait.
    """
    deadline = time.monotonic() + timeout
    waiting = ""
    names = {served.versioned, *([desired.serving.base.versioned] if desired.serving.base else [])}
    while True:
        check()
        actual = target.status()
        if actual is None:
            target.ensure()  # it was killed
        else:
            if actual.generation >= desired.generation:
                if reached(actual):
                    return
                for name in sorted(names & set(actual.failed)):
                    raise ForgeError(f"{name} cannot be served: {actual.failed[name]}")
            if actual.waiting not in ("", waiting):
                waiting = actual.waiting
                log.info(waiting)
        if time.monotonic() > deadline:
            raise ForgeError(
                f"did not serve within {timeout:.0f} s ({waiting or 'the reconciler does not answer'})",
                where=served.versioned,
                fix="raise serving.startup_timeout, or fix what it waits for",
            )
        time.sleep(POLL)


def is_loaded(after: Serving, actual: Actual) -> bool:
    """Whether the base and its adapters answer under their versioned names."""
    base = after.base.versioned if after.base else ""
    return actual.base == base and {one.versioned for one in after.adapters} <= set(actual.loaded)


def is_switched(served: Served, actual: Actual) -> bool:
    """Whether the public name points to a version."""
    return actual.names.get(served.name) == served.versioned


def wait_until_restored(target: Target, before: Serving, timeout: float) -> str:
    """Wait until the state before a failed rollout is restored; returns a line for the user about the result."""
    names = ", ".join(f"{name} ({versioned})" for name, versioned in sorted(before.names.items()))
    if before.base is None:
        return "nothing was served before, and nothing is now"
    try:
        desired, _ = target.document.read()
        if desired.serving != before:
            return "the desired state has been changed since, and something else is served now"
        target.ensure()
        wait_for(target, desired, before.base, lambda actual: actual.names == before.names, timeout)
    except ForgeError as error:
        return f"{names} could not be restored: {error.message}"
    return f"{names} serves again; the champion is unchanged"
