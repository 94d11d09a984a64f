"""Handling of Ctrl-C and SIGTERM: never lost, deferred around critical steps, both raised as KeyboardInterrupt."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


def keep_interrupts() -> None:
    """Send a Ctrl-C again if Python dropped it.

    Python only prints an exception that is raised in a finalizer (`__del__`, a weak reference's callback), and then
    continues. Without this, a KeyboardInterrupt raised there would be lost, as would the SystemExit of Flyte's handler.
    https://docs.python.org/3/reference/datamodel.html#object.__del__
    """
    report = sys.unraisablehook

    def send_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, (KeyboardInterrupt, SystemExit)):
            report(unraisable)
        else:  # later, since it would be dropped again in here
            threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()

    sys.unraisablehook = send_again


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until the block has ended, for example while a child process is started and recorded.

    The first one is then passed to its handler; without a handler it raises KeyboardInterrupt. Has no effect outside
    the main thread, since Python handles signals in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    handlers = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if pending:
        handler = handlers[signal.Signals(pending[0])]
        if not callable(handler):
            raise KeyboardInterrupt
        handler(pending[0], None)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, as on Ctrl-C, so that cleanup runs. Has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
