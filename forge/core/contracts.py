"""The small values that stages pass on. The data stays in the store; these name it and describe it.

Every artifact has a content digest. The digest and the store's identity are its key in the Flyte cache: tasks annotate
their outputs with `HashMethod(cache_key)`. An equal artifact that was built in another way, or has another path, causes
no reruns, and an artifact of a store that has since been wiped is never found in the cache.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from forge.core.recipe import MAX_LORA_RANK, MAX_LORAS

# The date for chat templates that contain the current date (the default date of Llama 3.1's template), in training and
# in evaluation. With it, the same rows give the same data set on every day, and prompts in evaluation match training.
TODAY = datetime.datetime(2024, 7, 26)


class Contract(BaseModel):
    """Base of the values that stages pass on: immutable, no unknown keys, and no paths, since pods share no disk.

    Files are named by URI and read through the store. A string that is an absolute path is a validation error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="after")
    def _no_paths(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("/"):
                raise ValueError(f"{name} is the path {value}, which other machines don't have; give a URI")
        return self


class Result(Contract):
    """The result of a stage: when it `started` (Unix time) and how many `seconds` it took."""

    started: float = 0.0
    seconds: float = 0.0


class Artifact(Result):
    """A directory in the store, complete and immutable once published.

    `digest` is the digest of its contents; `store` is the identity of the store (not its address).
    """

    uri: str
    digest: str
    store: str


def cache_key(artifact: Artifact) -> str:
    """An artifact's key in the Flyte cache."""
    return f"{artifact.digest}@{artifact.store}"


def value_key(value: BaseModel) -> str:
    """The cache key of a value that is not an artifact: a digest of all its fields.

    By default Flyte hashes a value's MessagePack bytes, which differ between runs, since the order of keys does.
    """
    return hashlib.sha256(json.dumps(value.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class Source(Artifact):
    """The raw rows, outside the store, as preflight found them: DataRecipe.source, and in `heldout` the user's own
    held-out rows, if any. The digest covers both; `store` is the store that results are published to.
    """

    heldout: str = ""


class Base(Contract):
    """The weights that training starts from, as preflight found them: a directory's URI, or a model ID on the Hub.

    For a registered model it is the URI of its package, and for a local directory a file:// URI;
    forge.registry.packages.local_base opens any of them. `revision` pins the contents: a commit on the Hub, or the
    digest of the directory or package. When training from scratch, both are empty until training has created the
    random initial weights.
    """

    location: str = ""
    revision: str = ""

    @field_validator("location", mode="before")
    @classmethod
    def _as_uri(cls, location: str) -> str:
        """Manifests of earlier releases have a path here."""
        return Path(location).as_uri() if location.startswith("/") else location


class Dataset(Artifact):
    """Packed training rows, and held-out rows. `report` is the URI of an HTML page."""

    train_rows: int
    heldout_rows: int
    report: str = ""


class Model(Artifact):
    """A trained model: `model/` in Hugging Face format, and `base`, the weights that training started from."""

    base: Base


class Champion(Contract):
    """The version that serves, and its package: the URI, and the digest it was registered with (or "").

    `Champion()` means that there is no champion.
    """

    version: str = ""
    uri: str = ""
    digest: str = ""
    run_id: str = ""


class Evaluation(Artifact):
    """A model's scores on the held-out set, with those of its base and of the champion.

    Scores are in [0, 1]. `nll` is the negative log-likelihood of the expected answer in nats per token, averaged over
    items; None if it is not finite. `json_validity` is None if no expected answer is JSON; `score_champion` is None if
    there is no champion or the model is the champion. `verdict` and `reason` (one line) are the gate's. `report` is the
    URI of an HTML page.
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
    verdict: Literal["passed", "rejected", "inconclusive"]
    reason: str
    report: str


class Version(Artifact):
    """A package in the store (uri, digest), and its version in MLflow."""

    name: str
    version: str
    run_id: str


class Deployment(Result):
    """A served version: `name` is the model's name in the OpenAI-compatible API at `endpoint`.

    `agreement` says how many of the replayed prompts got the same answer as in evaluation. `how` says whether the
    rollout swapped an adapter or the base's weights, only moved a name, or changed nothing. `previous` is the version
    that served before ("" for none). `swap_seconds` passed between the change of the desired state and readiness.
    Latencies are mean seconds for the same prompts under the public name, None if nothing served before.
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
    """Options that vLLM is started with, apart from the base model; None is vLLM's default."""

    max_loras: int = Field(MAX_LORAS, ge=0, description="adapters active together; 0 starts vLLM without adapters")
    max_lora_rank: int = MAX_LORA_RANK
    max_model_len: int | None = None
    tensor_parallel: int = 1
