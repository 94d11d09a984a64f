"""A claim to a lease by conditional writes: the lease is one object, and only the version just read can be replaced."""

import uuid
from typing import TYPE_CHECKING

from pydantic import BaseModel

from forge.storage.lease_watch import LeaseWatch
from forge.storage.records import parse_or_none

if TYPE_CHECKING:
    from forge.storage import Store


class Holder(BaseModel):
    """The content of the object. Each claim has its own `token`, and each write of it another number of `renewals`."""

    owner: str
    token: str
    renewals: int = 0
    released: bool = False


class ConditionalClaim:
    """A claim that writes the object <key>.json if that is absent, released or abandoned.

    A released object stays in the store. If it were deleted, a delayed request of an earlier holder could create it
    again.
    """

    def __init__(self, store: "Store", key: str, owner: str, watch: LeaseWatch) -> None:
        self.store, self.key, self.watch = store, f"{key}.json", watch
        self.mine = Holder(owner=owner, token=uuid.uuid4().hex)
        self._acquired = False

    def join(self) -> None:
        """Nothing to do: there is no queue."""

    def ahead(self) -> str:
        """The present holder, or "" once this claim has taken the lease."""
        data, version = self.store.read_version(self.key) or (b"", "")
        holder = parse_or_none(Holder, data)
        owner = holder.owner if holder else "an unknown process"
        if self._is_mine(holder):  # a write of ours arrived, though its answer did not
            self._acquired = True
        elif not version or (holder and holder.released) or self.watch.is_abandoned(self.key, data, owner):
            self._acquired = self._write(version)
        return "" if self._acquired else owner

    def renew(self) -> None:
        """Write the object again if it is still ours."""
        if self._acquired and (version := self._my_version()):
            self._write(version)

    def is_held(self) -> bool:
        """Whether the object is still ours."""
        return bool(self._my_version())

    def release(self) -> None:
        """Mark the object as released if it is still ours."""
        if version := self._my_version():
            self._write(version, released=True)

    def _is_mine(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token == self.mine.token and not holder.released

    def _my_version(self) -> str:
        """The version of the object if it is ours, or ""."""
        data, version = self.store.read_version(self.key) or (b"", "")
        return version if self._is_mine(parse_or_none(Holder, data)) else ""

    def _write(self, version: str, released: bool = False) -> bool:
        """Replace this version of the object ("": create it); False if it has changed meanwhile."""
        self.mine = self.mine.model_copy(update={"renewals": self.mine.renewals + 1, "released": released})
        return self.store.put_if_unchanged(self.key, self.mine.model_dump_json().encode(), version)
