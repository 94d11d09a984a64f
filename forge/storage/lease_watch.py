"""Which claims to a lease are abandoned, as a waiting process sees them."""

import time
from collections.abc import Callable


class LeaseWatch:
    """Remembers since when each claim has been unchanged, by the monotonic clock of this process."""

    def __init__(self, abandoned: float, earlier_attempt: Callable[[str], bool]) -> None:
        self.abandoned = abandoned  # seconds
        self.earlier_attempt = earlier_attempt
        self._seen: dict[str, tuple[bytes, float]] = {}

    def is_abandoned(self, name: str, data: bytes, owner: str) -> bool:
        """Whether a claim has not changed for too long, or its owner is an earlier attempt of this task."""
        before, since = self._seen.get(name, (b"", 0.0))
        if before != data:
            self._seen[name] = (data, time.monotonic())
            return self.earlier_attempt(owner)
        return time.monotonic() - since > self.abandoned or self.earlier_attempt(owner)
