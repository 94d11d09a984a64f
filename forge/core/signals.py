"""A Ctrl-C that is never lost."""

import signal
import sys
import threading


def keep_interrupts() -> None:
    """Send a Ctrl-C again that Python dropped.

    Python only reports what a finaliser (`__del__`, a weak reference's callback) raises, and goes on. An interrupt
    whose moment falls into one would leave the run going, as would the `exit` of Flyte's handler for it.
    https://docs.python.org/3/reference/datamodel.html#object.__del__
    """
    report = sys.unraisablehook

    def send_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, (KeyboardInterrupt, SystemExit)):
            report(unraisable)
        else:  # later: from here, it would be dropped once more
            threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()

    sys.unraisablehook = send_again
