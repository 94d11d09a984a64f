"""Closes the S3 sessions that Flyte's client opens for inputs and outputs, before Python exits."""

import asyncio
import contextlib
import sys
import threading


def close_sessions_at_exit() -> None:
    """Close the sessions at exit. Otherwise each open one is logged as an error, in many lines."""
    # Flyte's client stops their event loops in an atexit handler; threading's handlers run before those.
    threading._register_atexit(_close)  # type: ignore[attr-defined]


def _close() -> None:
    core = sys.modules.get("s3fs.core")
    for system in list(core.S3FileSystem._cache.values()) if core else ():
        # Synchronous file systems have no loop, and close themselves.
        with contextlib.suppress(Exception):
            loop = system.storage_options["loop"]
            asyncio.run_coroutine_threadsafe(system._s3creator.__aexit__(None, None, None), loop).result(timeout=5)
