"""What other processes do with a store. It imports little, so that they start quickly."""

import hashlib
import time
from pathlib import Path

from forge.core.settings import Settings
from forge.storage import lease as lease_module
from forge.storage import open_store
from forge.storage.lease import lease


def fetch(settings: Settings, uri: str) -> dict[str, str]:
    """SHA-256 of each file of an artifact."""
    directory = open_store(settings).path(uri)
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def count_up(settings: Settings, counter: Path, times: int) -> bool:
    """Add 1 to the number in a file that many times, holding a lease; returns whether it was never held by two."""
    lease_module.POLL = 0.02
    store, alone, inside = open_store(settings), True, counter.with_name("inside")
    for _ in range(times):
        with lease(store, "counting") as check:
            number = int(counter.read_text())
            alone = alone and not inside.exists()
            inside.touch()
            time.sleep(0.01)
            counter.write_text(str(number + 1))
            inside.unlink()
            check()
    return alone


def hold(settings: Settings, acquired: Path) -> None:
    """Hold a lease until killed, once it is acquired."""
    with lease(open_store(settings), "dates"):
        acquired.touch()
        time.sleep(600)
