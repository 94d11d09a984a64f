"""The small values that pass between stages. The bytes stay in the store; these say where they are and what they are.

Every artifact has a content digest, and the digest (with the store's identity) keys the Flyte cache: the doors
annotate their outputs with `HashMethod(cache_key)`. So an equal artifact made in another way, or found at another
path, does not make later stages run again, and an artifact of a store that has since been wiped is never taken for
one that is still there.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Chat templates that tell the date tell this one (Llama 3.1's own), in training and in evaluation: so the same rows
# are the same data set tomorrow, and a model is asked what it was trained on.
TODAY = datetime.datetime(2024, 7, 26)


class Contract(BaseModel):
    """Base of what passes between stages: immutable, no unknown keys, and no path, since pods share no disk.

    A file is named by its URI, and whoever needs it asks the store. ValueError for a string that is an absolute path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="after")
    def _no_paths(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("/"):
                raise ValueError(f"{name} is the path {value}, which another machine does not have; give a URI")
        return self


class Result(Contract):
    """What a stage came to, when it `started` (Unix time) and how many `seconds` it worked."""

    started: float = 0.0
    seconds: float = 0.0


class Artifact(Result):
    """A directory in the store, complete and never changed after it was published.

    `digest` is that of its files' contents; `store` is the identity of the store (not its address).
    """

    uri: str
    digest: str
    store: str


def cache_key(artifact: Artifact) -> str:
    """What of an artifact decides whether later stages run again."""
    return f"{artifact.digest}@{artifact.store}"


def value_key(value: BaseModel) -> str:
    """The same of a value that is no artifact: a digest of all of it.

    Flyte would otherwise hash a value's bytes, which differ from run to run, as MessagePack keeps no order of keys.
    """
    return hashlib.sha256(json.dumps(value.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class Source(Artifact):
    """The raw rows, found by preflight, outside the store: what DataRecipe.source names, and in `heldout` the rows of
    the user's own to evaluate on, if there are any. The digest is of both; `store` is the one their results go to.
    """

    heldout: str = ""


class Base(Contract):
    """The weights that training starts from, found by preflight: the URI of a directory, or a model id of the hub.

    For a registered model it is the URI of its package, and for a directory of this machine a file:// URI;
    forge.registry.packages.local_base gives what can be opened. `revision` pins the contents: a commit of the hub, or
    the digest of the directory or package. Both are empty for training from scratch, until training has made the
    random weights that it starts from.
    """

    location: str = ""
    revision: str = ""

    @field_validator("location", mode="before")
    @classmethod
    def _as_uri(cls, location: str) -> str:
        """A directory's URI also where manifests of earlier releases have its path."""
        return Path(location).as_uri() if location.startswith("/") else location


class Dataset(Artifact):
    """Validated, deduplicated, split, tokenised and packed rows, and held-out ones; `report` is the URI of a page."""

    train_rows: int
    heldout_rows: int
    report: str = ""


class Model(Artifact):
    """What training left: `model/` in Hugging Face format, and `base`, the weights it started from."""

    base: Base


class Champion(Contract):
    """The version that serves, and its package: its URI, and the digest that it was registered with (or "").

    `Champion()` says that there is none.
    """

    version: str = ""
    uri: str = ""
    digest: str = ""
    run_id: str = ""


class Evaluation(Artifact):
    """A model's figures on the held-out rows, beside those of what it was trained from (base) and of the champion.

    Scores are shares in [0, 1]; `nll` is the mean over items of nats a token of the expected answer, None where it is
    no number; `json_validity` is None when no expected answer is JSON, `score_champion` when there is no champion or
    the model is it. `verdict` is the gate's, with its reason in one line; `report` is an HTML page's URI.
    """

    items: int
    score: float
    score_base: float
    score_champion: float | None = None
    exact_match: float
    nll: float | None
    nll_base: float | None
    json_validity: float | None
    champion: str = ""
    verdict: Literal["pass", "refuse", "inconclusive"]
    reason: str
    report: str


class Version(Artifact):
    """A package in the store (uri, digest) and the version of it in MLflow."""

    name: str
    version: str
    run_id: str


class Deployment(Result):
    """What is serving: an OpenAI-compatible API at `endpoint`, where `name` is the model to ask for.

    `agreement` says how many of the prompts asked again over the API were answered as in evaluation. `how` is whether
    an adapter was swapped, a base's weights were, or the version was serving already; `previous` is the version that
    served before ("" for none). `swap_seconds` went by between the change of the desired state and serving; latencies
    are mean seconds of the same prompts under the public name, None where nothing served before.
    """

    endpoint: str
    name: str
    version: str
    digest: str
    agreement: str
    how: Literal["adapter", "weights", "name", "unchanged"]
    previous: str = ""
    previous_digest: str = ""
    swap_seconds: float = 0.0
    latency_before: float | None = None
    latency_after: float | None = None


class Engine(Contract):
    """What vLLM is started with beside the base's weights; None leaves a value to vLLM."""

    max_loras: int = Field(2, ge=0, description="adapters that answer at once; 0 starts vLLM without adapters")
    max_lora_rank: int = 16
    max_model_len: int | None = None
    tensor_parallel: int = 1
