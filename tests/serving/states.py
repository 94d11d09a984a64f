"""Models and states of the server for tests, made up of names and digests only."""

import contextlib
from pathlib import Path

from forge.core.settings import Settings
from forge.serving.desired import Conflict, Desired, Served, Serving
from forge.serving.local_target import FileDocument


def version(number: int, name: str = "dates") -> Served:
    """A version of a model."""
    digest = f"{number:x}" * 64
    return Served(name=name, version=str(number), uri=f"file:///store/models/{name}/sha256-{digest}", digest=digest)


def serving(base: Served, *adapters: Served, names: dict[str, Served] | None = None) -> Serving:
    """A state of the server; by default each model, and of several of one name the last, serves under its name."""
    targets = names if names is not None else {one.name: one for one in (base, *adapters)}
    return Serving(base=base, adapters=adapters, names={name: one.versioned for name, one in targets.items()})


def desired(state: Serving, generation: int = 1) -> Desired:
    """A document without a trial."""
    return Desired(generation=generation, serving=state)


WEIGHTS = {"kind": "model", "base": {"location": "random bytes", "revision": ""}}


def adapter_of(base: Served) -> dict:
    """The manifest of an adapter of a base."""
    return {"kind": "adapter", "base": {"location": base.uri, "revision": base.digest}}


def count_up(home: str, times: int) -> None:
    """Increment the document's generation, as one of several concurrent writers."""
    document = FileDocument(Settings(home=Path(home)))
    done = 0
    while done < times:
        read, revision = document.read()
        with contextlib.suppress(Conflict):
            document.write(read.model_copy(update={"generation": read.generation + 1}), revision)
            done += 1
