"""The S3 sessions that Flyte's client opens for its inputs and outputs, closed before Python ends."""

import asyncio
import contextlib
import sys
import threading


def close_sessions_at_exit() -> None:
    """Close them when the program ends: each that is left open is otherwise reported as an error, in many lines."""
    # Flyte's client stops their event loops by atexit. What threading calls comes before that.
    threading._register_atexit(_close)  # type: ignore[attr-defined]


def _close() -> None:
    core = sys.modules.get("s3fs.core")
    for system in list(core.S3FileSystem._cache.values()) if core else ():
        # Those that are not asynchronous, and have no such loop, close themselves.
        with contextlib.suppress(Exception):
            loop = system.storage_options["loop"]
            asyncio.run_coroutine_threadsafe(system._s3creator.__aexit__(None, None, None), loop).result(timeout=5)
