"""A claim to a lease by Lamport's bakery algorithm, for S3 servers without conditional writes.

https://lamport.azurewebsites.net/pubs/bakery.pdf
"""

import threading
import uuid
from typing import TYPE_CHECKING

from pydantic import BaseModel

from forge.storage.lease_watch import LeaseWatch
from forge.storage.records import parse_or_none

if TYPE_CHECKING:
    from forge.storage import Store


class Ticket(BaseModel):
    """The content of a claim's object. `number` is None until the claim has drawn one."""

    owner: str
    number: int | None
    renewals: int = 0


class BakeryClaim:
    """A claim that is an object under <key>/. Each draws a number above all others; the lowest one holds the lease.

    The store must only show what has been written to whoever lists it afterwards.
    """

    def __init__(self, store: "Store", key: str, owner: str, watch: LeaseWatch) -> None:
        self.store, self.key, self.watch = store, key, watch
        self.name = uuid.uuid4().hex
        self.mine = Ticket(owner=owner, number=None)
        self._mutex = threading.Lock()  # a renewal from another thread must not undo the drawing of a number

    def join(self) -> None:
        """Draw a number. The others wait while this claim has none, since it may be about to draw a lower one."""
        with self._mutex:
            self._write(None)
            self._write(1 + max((ticket.number or 0 for ticket in self._others().values()), default=0))

    def ahead(self) -> str:
        """The owner of a claim with a lower number or none yet, or "" if this claim is the lowest."""
        for name, ticket in self._others().items():
            if ticket.number is None or (ticket.number, name) < (self.mine.number or 0, self.name):
                return ticket.owner
        if not self.is_held():  # another process took this claim for abandoned while it waited
            self.join()
            return self.ahead()
        return ""

    def renew(self) -> None:
        """Write the claim again if it has not been deleted."""
        with self._mutex:
            if self.is_held():
                self._write(self.mine.number)

    def is_held(self) -> bool:
        """Whether the claim still exists."""
        return self.store.read(f"{self.key}/{self.name}") is not None

    def release(self) -> None:
        """Delete the claim."""
        self.store.delete(f"{self.key}/{self.name}")

    def _write(self, number: int | None) -> None:
        self.mine = self.mine.model_copy(update={"number": number, "renewals": self.mine.renewals + 1})
        self.store.put(f"{self.key}/{self.name}", self.mine.model_dump_json().encode())

    def _others(self) -> dict[str, Ticket]:
        """The other claims by name. Deletes those that are abandoned."""
        others = {}
        for name in self.store.names(self.key):
            data = None if name == self.name else self.store.read(f"{self.key}/{name}")
            if data is None:  # ours, or just released
                continue
            ticket = parse_or_none(Ticket, data) or Ticket(owner="an unknown process", number=None)
            if self.watch.is_abandoned(name, data, ticket.owner):
                self.store.delete(f"{self.key}/{name}")
            else:
                others[name] = ticket
        return others
