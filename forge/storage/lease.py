"""A lease in the store: one holder at a time among all processes and machines that share the store."""

import contextlib
import getpass
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from forge.core.errors import ForgeError
from forge.storage.lease_bakery import BakeryClaim
from forge.storage.lease_conditional import ConditionalClaim
from forge.storage.lease_watch import LeaseWatch

if TYPE_CHECKING:
    from forge.storage import Store

log = logging.getLogger(__name__)

RENEWED = 10.0  # seconds between the renewals of a lease
ABANDONED = 60.0  # seconds without a renewal after which another process may take the lease over
POLL = 0.2  # seconds between the looks of a process that waits


class Claim(Protocol):
    """A process's claim to a lease."""

    def join(self) -> None:
        """Begin to wait."""

    def ahead(self) -> str:
        """The owner that this claim waits for, or "" once it holds the lease."""

    def renew(self) -> None:
        """Show the others that the process lives."""

    def is_held(self) -> bool:
        """Whether the lease has not been lost."""

    def release(self) -> None:
        """Leave the lease to the others."""


@contextlib.contextmanager
def lease(store: "Store", name: str) -> Iterator[Callable[[], None]]:
    """Wait for the lease and hold it. Yields a function that raises ForgeError if the lease has been lost meanwhile.

    The lease is renewed while its holder's process lives. A process that waits takes it over after a minute without
    renewal, by its own clock, so clocks need not agree. This relies on conditional writes if the store has them, and
    otherwise on Lamport's bakery algorithm.
    """
    key = f"leases/{name}"
    claim = _claim(store, key)
    claim.join()
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(claim, ended), daemon=True)
    try:
        renewing.start()
        _wait(claim, store.uri(key))
        yield lambda: _check(claim, store.uri(key))
    finally:
        ended.set()
        if renewing.is_alive():
            renewing.join()
        claim.release()


def _claim(store: "Store", key: str) -> Claim:
    watch = LeaseWatch(ABANDONED, earlier_attempt)
    kind = ConditionalClaim if store.conditional_writes else BakeryClaim
    return kind(store, key, current_owner(), watch)


def _wait(claim: Claim, uri: str) -> None:
    logged = ""
    while owner := claim.ahead():
        if owner != logged:
            log.info("waiting for %s, which holds %s", owner, uri)
            logged = owner
        time.sleep(POLL)


def _renew(claim: Claim, ended: threading.Event) -> None:
    while not ended.wait(RENEWED):
        with contextlib.suppress(ForgeError):  # the holder's check reports a lost lease
            claim.renew()


def _check(claim: Claim, uri: str) -> None:
    if not claim.is_held():
        raise ForgeError(
            f"the lease was lost, since it was not renewed for {ABANDONED:.0f} s", where=uri, fix="run again"
        )


def earlier_attempt(owner: str) -> bool:
    """Whether an owner is an earlier attempt of this Flyte task, whose pod has ended.

    In a Flyte execution only one task at a time takes leases or rolls out, and only one attempt of it runs.
    """
    return "FLYTE_INTERNAL_EXECUTION_ID" in os.environ and owner == current_owner()


def current_owner() -> str:
    """The name of this process for others: the Flyte execution, or the user and the machine."""
    if execution := os.environ.get("FLYTE_INTERNAL_EXECUTION_ID"):
        parts = [os.environ.get(f"FLYTE_INTERNAL_EXECUTION_{part}", "") for part in ("PROJECT", "DOMAIN")]
        return "/".join(["execution", *filter(None, parts), execution])
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, a user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
