"""The desired state: one small document that says what should be served, and the report of what is served.

A rollout or an operator changes the document; the reconciler next to vLLM makes it so and reports the actual state.
Writers use compare-and-set: a write succeeds only if no one else has written since the read. Locally the document is a
file, on the cluster a ConfigMap. While a rollout is in progress, the document also holds its trial: what it tries, how
far it is, and what served before, so that any process can undo a rollout whose own process died (trial.py).
"""

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pydantic import ConfigDict, Field, ValidationError, field_validator

from forge.core.contracts import Contract, Engine
from forge.core.errors import ForgeError
from forge.registry.packages import PACKAGE, directory_of


class Served(Contract):
    """A model that answers requests: the package of a registered version, or a base model that adapters need.

    `name` is the public name. `version` is MLflow's, "" for a base that isn't registered. `uri` is a package in the
    store, a directory of this machine (file://), or a model ID of the hub. `digest` is the package's or the directory's
    digest, or the hub's revision.
    """

    name: str
    version: str
    uri: str
    digest: str

    @field_validator("uri")
    @classmethod
    def _as_uri(cls, uri: str) -> str:
        """Documents and manifests of older releases have a directory's path."""
        return Path(uri).as_uri() if uri.startswith("/") else uri

    @property
    def directory(self) -> Path | None:
        """The directory of this machine that `uri` names; None for a package or a model of the hub."""
        return None if PACKAGE.fullmatch(self.uri) else directory_of(self.uri)

    @property
    def versioned(self) -> str:
        """The versioned name, under which vLLM serves it. It contains the digest, so no two packages share it."""
        return f"{self.name}-{self.digest[:12]}"


class Serving(Contract):
    """A state of the server: the base model, the adapters loaded on it, and the public names.

    `names` maps each public name to the versioned name of the base or of an adapter.
    """

    base: Served | None = None
    engine: Engine = Engine()
    adapters: tuple[Served, ...] = ()
    names: dict[str, str] = Field(default_factory=dict)

    def all(self) -> list[Served]:
        """The base, if any, and its adapters."""
        return [*([self.base] if self.base else []), *self.adapters]

    def find(self, name: str) -> Served | None:
        """The model that a public name points to."""
        return next((one for one in self.all() if one.versioned == self.names.get(name)), None)


class RolloutState(StrEnum):
    """How far a rollout is. The states are reached in this order (tasks/rollout/rollout.py has the transitions)."""

    STARTED = "started"  # the trial is in the document
    LOADED = "loaded"  # vLLM answers under the versioned name
    PROVED = "proved"  # its answers match those of evaluation
    SWITCHED = "switched"  # the public name points to the new version
    WATCHED = "watched"  # it served its clients for the watch period, without errors and fast enough
    PROMOTED = "promoted"  # it is recorded as the champion


class Trial(Contract):
    """A rollout in progress: it tries to serve `of` under the public name `name`, and goes back to `before` on failure.

    `champion` is the version that was the champion when it started ("" for none). `process` is the process that runs it
    (forge/core/processes.py), which increments `renewals` every few seconds. `state` is the last state it has reached,
    as of the last write. Unknown keys are ignored, so that a later release can add some.
    """

    model_config = ConfigDict(extra="ignore")

    id: str
    name: str
    of: Served
    before: Serving
    champion: str
    owner: str
    process: str
    renewals: int = 0
    state: RolloutState = RolloutState.STARTED


class Desired(Contract):
    """The document. `generation` counts its changes, apart from renewals."""

    generation: int = 0
    serving: Serving = Serving()
    trial: Trial | None = None


class Actual(Contract):
    """The reconciler's report. It describes its last step, for the given generation of the document.

    `base` is the versioned name that vLLM serves ("" while it doesn't answer), `loaded` are its adapters, and `names`
    maps public names to versioned names. `in_flight` counts requests by versioned name. `failed` maps a versioned name
    to the reason why it can't be served. `waiting` says what the reconciler waits for ("" once all is as desired).
    """

    generation: int = 0
    base: str = ""
    loaded: tuple[str, ...] = ()
    names: dict[str, str] = Field(default_factory=dict)
    in_flight: dict[str, int] = Field(default_factory=dict)
    failed: dict[str, str] = Field(default_factory=dict)
    waiting: str = ""


class Conflict(Exception):
    """Another writer has changed the document since it was read."""


class DesiredStore(Protocol):
    """Where the document is kept. `where` names it in messages."""

    where: str

    def read(self) -> tuple[Desired, str]:
        """The document and its revision; an empty document if there is none yet. ForgeError if it can't be parsed."""

    def write(self, desired: Desired, revision: str) -> None:
        """Replace the document of this revision; raises Conflict if it has another revision by now."""

    def wait(self, seconds: float) -> None:
        """Sleep, at most until the document is seen to have changed since the last read."""


class Failed(Exception):
    """A model can't be served, and waiting won't help. The message says why."""


class Server(Protocol):
    """vLLM, as the reconciler starts it: a process on this machine, or a Deployment. `url` is vLLM's, without /v1."""

    url: str

    def ensure(self, base: Served, path: str, engine: Engine) -> str:
        """Take the next step towards a vLLM that serves the base from `path`, without blocking.

        Returns "" once vLLM serves it, otherwise what it waits for. Raises Failed if vLLM can't serve it. A server that
        already runs with the same base and options is left alone; any other is replaced.
        """

    def stop(self) -> object:
        """Stop vLLM."""


def read_document(text: str, where: str) -> Desired:
    """Parse the document; ForgeError if it is invalid."""
    try:
        return Desired.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]
        place = ".".join(str(part) for part in reason["loc"])
        raise ForgeError(
            f"not a valid description of what to serve ({place}: {reason['msg']})",
            where=where,
            fix="fix it, or delete it, which stops serving, and roll out again",
        ) from None


def revision_of(text: str) -> str:
    """A revision for stores that have none of their own."""
    return hashlib.sha256(text.encode()).hexdigest()
