"""What should be served, as one small document that is changed by compare-and-set, and what is served.

The document is the only command there is: a rollout changes it, and the reconciler beside vLLM makes it so. While a
rollout is under way the document holds its trial, with what served before. A trial is renewed while its process
lives; one that is not was broken off, and whoever finds it undoes it (forge/serving/trial.py).
"""

import hashlib
from pathlib import Path
from typing import Protocol

from pydantic import Field, ValidationError, field_validator

from forge.core.contracts import Contract, Engine
from forge.core.errors import ForgeError
from forge.registry.packages import PACKAGE, directory_of


class Served(Contract):
    """Something that answers requests: a package of a registered version, or a base model that adapters stand on.

    `uri` is a package's in the store, that of a directory of this machine (file://), or a model id of the hub; `digest`
    is the package's, or the revision that pins the others. `version` is MLflow's, and "" for a base that is no version.
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
        """The directory of this machine that it is, None where it is a package or a model of the hub."""
        return None if PACKAGE.fullmatch(self.uri) else directory_of(self.uri)

    @property
    def versioned(self) -> str:
        """The name that vLLM itself knows it by: no two packages have the same."""
        return f"{self.name}-{self.digest[:12]}"


class Serving(Contract):
    """A state of the server: the base's weights, adapters beside them, and where public names lead.

    `names` leads from each public name to the versioned name of the base or of one of the adapters.
    """

    base: Served | None = None
    engine: Engine = Engine()
    adapters: tuple[Served, ...] = ()
    names: dict[str, str] = Field(default_factory=dict)

    def all(self) -> list[Served]:
        """The base, if there is one, and its adapters."""
        return [*([self.base] if self.base else []), *self.adapters]

    def find(self, name: str) -> Served | None:
        """What a public name leads to."""
        return next((one for one in self.all() if one.versioned == self.names.get(name)), None)


class Trial(Contract):
    """A rollout under way: what it tries under which public name, and the state to go back to.

    `id` is its own, and `champion` the version that was the champion when it began ("" for none). `process` is who
    carries it on (forge/core/processes.py); it counts up `renewals` while it lives.
    """

    id: str
    name: str
    of: Served
    before: Serving
    champion: str
    owner: str
    process: str
    renewals: int = 0


class Desired(Contract):
    """The document. `generation` counts its changes."""

    generation: int = 0
    serving: Serving = Serving()
    trial: Trial | None = None


class Actual(Contract):
    """What the reconciler reports: how far it has come with which generation of the document.

    `base` is the versioned name that vLLM serves ("" while it does not answer), `loaded` its adapters, `names` where
    public names lead now. `failed` says why something cannot be served, by versioned name, and `waiting` what is being
    waited for ("" where all is as desired).
    """

    generation: int = 0
    base: str = ""
    loaded: tuple[str, ...] = ()
    names: dict[str, str] = Field(default_factory=dict)
    in_flight: dict[str, int] = Field(default_factory=dict)
    failed: dict[str, str] = Field(default_factory=dict)
    waiting: str = ""


class Conflict(Exception):
    """The document was changed by another writer since it was read."""


class DesiredStore(Protocol):
    """Where the document is kept."""

    where: str

    def read(self) -> tuple[Desired, str]:
        """The document and its revision; an empty one where there is none yet. ForgeError where it is broken."""

    def write(self, desired: Desired, revision: str) -> None:
        """Replace the document that has this revision; raises Conflict where it has another one by now."""

    def wait(self, seconds: float) -> None:
        """Let so many seconds go by, fewer if it is seen to have changed since it was read."""


class Failed(Exception):
    """Something cannot be served, and trying again alone will not help: says why."""


class Server(Protocol):
    """vLLM, as the reconciler starts it: a process on this machine, or a Deployment."""

    url: str  # of vLLM, without /v1

    def ensure(self, base: Served, path: str, engine: Engine) -> str:
        """Bring vLLM a step nearer to serving the base from `path`, and return at once.

        Returns "" when vLLM serves it, else what is being waited for. Raises Failed where it cannot serve it. What
        runs already is left alone; what serves another base, or was started with other options, is replaced.
        """

    def stop(self) -> object:
        """Serve nothing."""


def read_document(text: str, where: str) -> Desired:
    """The document in a text; ForgeError where it is none."""
    try:
        return Desired.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]
        place = ".".join(str(part) for part in reason["loc"])
        raise ForgeError(
            f"{where}: not a description of what to serve ({place}: {reason['msg']}); fix it, or delete it, which "
            "ends what serves, and roll out again"
        ) from None


def revision_of(text: str) -> str:
    """A revision for stores that have none of their own."""
    return hashlib.sha256(text.encode()).hexdigest()
