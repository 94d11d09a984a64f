"""The stage's work: serve a version, prove it over the API, and only then make it the champion."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from filelock import FileLock, Timeout

from tasks.contracts import Deployment, Evaluation, Version
from tasks.errors import ForgeError
from tasks.package import open_package
from tasks.promotion import not_the_champion, promote
from tasks.recipe import ServingRecipe
from tasks.registry import find_champion, open_registry
from tasks.rollout.prove import prove
from tasks.rollout.server import LocalServer, Running, Spec, port_is_free
from tasks.settings import Settings
from tasks.storage import Store


@contextlib.contextmanager
def rollout_lock(settings: Settings, timeout: float) -> Iterator[None]:
    """One rollout at a time; the kernel gives the lock back if its holder dies."""
    settings.serving.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(settings.serving / "lock", timeout=timeout):
            yield
    except Timeout:
        raise ForgeError(
            f"another rollout has held {settings.serving / 'lock'} for {timeout:.0f} s; see what it does"
        ) from None


def roll_out(
    version: Version, evaluation: Evaluation, recipe: ServingRecipe, settings: Settings, store: Store
) -> Deployment:
    """Serve the version's package on the local port; what served before is started again if anything goes wrong.

    Raises ForgeError saying why the new model does not serve. The alias champion moves last.
    """
    started = time.time()
    server = LocalServer(settings)

    def prove_and_promote() -> str:
        evaluated = store.path(evaluation.uri)
        agreement = prove(settings.endpoint, version.name, evaluated, recipe.replay, recipe.min_agreement)
        why = f"{evaluation.verdict}: {evaluation.reason}; {agreement} answers as in evaluation"
        promote(open_registry(settings), store, version.name, version.version, evaluation.champion, why)
        return agreement

    with terminate_as_interrupt(), rollout_lock(settings, recipe.startup_timeout):
        _check_verdict(version, evaluation, settings)
        package, _ = open_package(version.uri, version.digest, settings, store)
        spec = Spec(version.name, version.version, version.digest, str(package), settings.serving_port)
        before = server.running()
        if before is not None and before.spec == spec and before.healthy():
            action = "was serving already"
            agreement = prove_and_promote()
        else:
            action = f"serves in place of {_describe(before)}" if before else "serves"
            with _way_back(server, before, recipe.startup_timeout):
                server.stop()
                if not port_is_free(spec.port):
                    raise ForgeError(
                        f"port {spec.port} is in use by another program; stop it, or set FORGE_SERVING_PORT"
                    )
                running = server.start(spec)
                print(f"roll_out: vLLM is starting, which takes up to a minute; its log is {running.log}", flush=True)
                server.wait_ready(running, recipe.startup_timeout)
                agreement = prove_and_promote()
    print(f"roll_out: {version.name} version {version.version} {action}; {agreement} answers as in evaluation")
    return Deployment(
        endpoint=settings.endpoint,
        name=version.name,
        version=version.version,
        digest=version.digest,
        agreement=agreement,
        started=started,
        seconds=time.time() - started,
    )


def _check_verdict(version: Version, evaluation: Evaluation, settings: Settings) -> None:
    """The gate compared with a champion; ForgeError where another one has taken its place since."""
    champion = find_champion(open_registry(settings), version.name)
    now = "" if champion is None else champion.version
    if now not in (evaluation.champion, version.version):
        raise not_the_champion(version.name, version.version, evaluation.champion, now)


@contextlib.contextmanager
def _way_back(server: LocalServer, before: Running | None, startup_timeout: float) -> Iterator[None]:
    """If anything goes wrong, start again what served before."""
    try:
        yield
    except BaseException as error:
        server.stop(grace=0)  # nobody uses it yet
        if before is not None:
            again = server.start(before.spec)
            if isinstance(error, ForgeError):
                serves = f"{_describe(before)} serves again; the champion is unchanged"
                try:
                    server.wait_ready(again, startup_timeout)
                except ForgeError as worse:
                    serves = f"{_describe(before)} could not be started again: {worse.message}"
                raise ForgeError(f"{error.message}\n{serves}") from None
        raise


def _describe(running: Running) -> str:
    return f"{running.spec.name} version {running.spec.version}"


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, so that a half-started server is not left behind."""
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
