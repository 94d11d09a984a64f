"""A lease in the store: one holder at a time, over all machines that share the store."""

import contextlib
import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from forge.core.errors import ForgeError

if TYPE_CHECKING:
    from forge.storage import Store

log = logging.getLogger(__name__)

RENEWED = 10.0  # seconds between a claim's renewals
ABANDONED = 60.0  # seconds without a renewal after which others remove a claim
POLL = 0.2  # seconds


@contextlib.contextmanager
def lease(store: "Store", name: str) -> Iterator[Callable[[], None]]:
    """Wait until it is our turn, and keep it; what is yielded raises ForgeError if the lease has been lost meanwhile.

    Lamport's bakery (https://lamport.azurewebsites.net/pubs/bakery.pdf): whoever comes draws a number above all that
    it sees, and lets the lower ones go first. It needs no conditional writes, which not all S3 servers have; only
    that what was written is seen by who lists next. Claims are renewed while their process lives. One that has not
    been for a minute, by the watch of whoever waits for it, is removed, so that no clocks need to agree.
    """
    claims = _Claims(store, f"leases/{name}")
    claims.write(None)  # about to draw a number: the others wait until it is known
    renewing = threading.Thread(target=claims.renew, daemon=True)
    try:
        claims.write(1 + max((number or 0 for number, _ in claims.others().values()), default=0))
        renewing.start()
        claims.wait()
        yield claims.check
    finally:
        claims.ended.set()
        if renewing.is_alive():
            renewing.join()
        store.delete(claims.mine)


class _Claims:
    """Our claim, and what we know of the others'."""

    def __init__(self, store: "Store", prefix: str) -> None:
        self.store, self.prefix = store, prefix
        self.own = uuid.uuid4().hex
        self.mine = f"{prefix}/{self.own}"
        self.number: int | None = None
        self.renewals = 0
        self.ended = threading.Event()
        self._seen: dict[str, tuple[bytes, float]] = {}

    def write(self, number: int | None) -> None:
        """Write our claim; without a number yet, or with it."""
        self.number = number
        self.renewals += 1
        claim = {"owner": current_owner(), "number": number, "renewals": self.renewals}
        self.store.put(self.mine, json.dumps(claim).encode())

    def renew(self) -> None:
        """Show the others that we live, until told to end."""
        while not self.ended.wait(RENEWED):
            with contextlib.suppress(ForgeError):  # check() says what comes of it
                self.check()
                self.write(self.number)

    def check(self) -> None:
        """ForgeError where our claim is gone."""
        if self.store.read(self.mine) is None:
            raise ForgeError(
                f"{self.store.uri(self.prefix)}: the lease was lost, as it had not been renewed for {ABANDONED:.0f} s; "
                "run again"
            )

    def others(self) -> dict[str, tuple[int | None, str]]:
        """Number and owner of each other claim; those that are abandoned, or were our own, are removed."""
        found = {}
        for name in self.store.names(self.prefix):
            data = None if name == self.own else self.store.read(f"{self.prefix}/{name}")
            if data is None:  # ours, or given back meanwhile
                continue
            before, since = self._seen.get(name, (b"", 0.0))
            if before != data:
                self._seen[name] = (data, time.monotonic())
            elif time.monotonic() - since > ABANDONED:
                self.store.delete(f"{self.prefix}/{name}")
                continue
            try:
                claim = json.loads(data)
                if earlier_attempt(str(claim["owner"])):
                    self.store.delete(f"{self.prefix}/{name}")
                    continue
                found[name] = (claim["number"], str(claim["owner"]))
            except (ValueError, KeyError, TypeError):
                found[name] = (None, "somebody")
        return found

    def wait(self) -> None:
        """Until nobody is before us."""
        told, self.number = "", self.number or 0
        while before := [
            owner
            for name, (number, owner) in self.others().items()
            if number is None or (number, name) < (self.number, self.own)
        ]:
            if before[0] != told:
                told = before[0]
                log.info(f"waiting for {told}, who holds {self.store.uri(self.prefix)}")
            time.sleep(POLL)
            self.check()


def earlier_attempt(owner: str) -> bool:
    """Whether what an owner holds was left by an earlier attempt of this task, whose pod has ended.

    A Flyte execution has one task at a time that takes leases or rolls out, and one attempt at a time of it.
    """
    return "FLYTE_INTERNAL_EXECUTION_ID" in os.environ and owner == current_owner()


def current_owner() -> str:
    """Who acts: the Flyte execution, or the user and the machine."""
    if execution := os.environ.get("FLYTE_INTERNAL_EXECUTION_ID"):
        parts = [os.environ.get(f"FLYTE_INTERNAL_EXECUTION_{part}", "") for part in ("PROJECT", "DOMAIN")]
        return "/".join(["execution", *filter(None, parts), execution])
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
