"""Where things are: from FORGE_* environment variables, with embedded defaults under .forge/.

What a run does is the recipe's business; settings only say where it happens.
"""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from forge.core.errors import Problems

PROJECT = Path(__file__).resolve().parents[2]
PREFIX = "FORGE_"
NO_SETTINGS = ("FORGE_TEST_", "FORGE_RUN_ID")  # of the tests, and of forge.core.logs


def shipped(name: str) -> Path:
    """A file or folder that comes with the code, such as recipes: beside the code, or else on Python's path.

    Code that `pyflyte run --remote` has sent may come without them; then the image has them.
    """
    beside = [PROJECT / name, *(Path(entry) / name for entry in sys.path if entry)]
    return next((path for path in beside if path.exists()), beside[0])


def path_of(name: str) -> Path:
    """The path that a file:// URI, or a path itself, names."""
    return Path(unquote(name.removeprefix("file://"))) if name.startswith("file://") else Path(name)


class Settings(BaseSettings):
    """One field a place; each is read from FORGE_<NAME IN CAPITALS>."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    home: Path = Field(PROJECT / ".forge", description="Where the embedded store, registry and serving state live")
    store: str = Field("", description="s3://bucket/prefix of the object store; empty: a directory under home")
    copies_gb: float = Field(100, gt=0, description="GB of local copies that are kept of what the object store has")
    mlflow_uri: str = Field("", description="MLflow tracking server; empty: SQLite under home")
    signing_key: Path | None = Field(None, description="Private key (PEM, elliptic curve) to sign packages with")
    verify_key: Path | None = Field(None, description="Its public key (PEM); with it, nothing unsigned is used")
    serving_python: Path = Field(
        PROJECT / ".venv-serving" / "bin" / "python", description="Python of the environment that holds vLLM"
    )
    harness_python: Path = Field(
        PROJECT / ".venv-harness" / "bin" / "python",
        description="Python of the environment that holds lm-evaluation-harness",
    )
    serving_port: int = Field(8000, ge=1024, le=65535, description="Port of the local OpenAI-compatible API")
    serving_target: Literal["local", "kubernetes"] = Field(
        "local", description="What serves: vLLM on this machine, or the cluster's Deployment vllm"
    )
    serving_url: str = Field("", description="URL of the cluster's vLLM, without /v1; empty: this machine's")
    serving_namespace: str = Field("ml-inference", description="Namespace of the cluster's vLLM")
    reconciler_url: str = Field("", description="URL of the cluster's reconciler; empty: this machine's")
    reconciler_port: int = Field(0, ge=0, le=65535, description="Port of the reconciler's status; 0: any that is free")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of the Prometheus endpoint that a training run has while it lasts; 0: none"
    )
    checkpoint_copies: str = Field(
        "", description="s3://bucket/prefix that checkpoints are copied to, so that a run goes on on another machine"
    )
    rollout: bool = Field(
        True, description="Whether a model that passes is rolled out; else the run ends with a registered challenger"
    )
    name_suffix: str = Field(
        "", pattern=r"^(-[a-z0-9-]+)?$", description="Added to the names of models and experiments: -development"
    )
    gpu_quota: int | None = Field(None, ge=0, description="GPUs that the quota of the tasks' namespace allows")
    gpus: int = Field(0, ge=0, description="GPUs that the pod of a task asked for, and must see; set by the pod itself")
    notify: str = Field("", description="E-mail addresses, with commas, that launch plans tell of runs that failed")
    s3_endpoint: str = Field("", description="URL of the S3 server that s3:// URIs are on, such as http://host:9000")
    s3_access_key: SecretStr = Field(SecretStr(""), description="Access key of that server")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="Secret key of that server")
    s3_region: str = Field("us-east-1", description="Region of that server")
    s3_virtual_host: bool = Field(False, description="Whether buckets are host names there, not the path's beginning")

    @field_validator("s3_endpoint", "serving_url", "reconciler_url")
    @classmethod
    def _url(cls, endpoint: str) -> str:
        if endpoint and not re.fullmatch(r"https?://[^/?#@\s]+/?", endpoint):
            raise ValueError("must be http://host:port or https://host:port")
        return endpoint

    @field_validator("checkpoint_copies", "store")
    @classmethod
    def _bucket(cls, uri: str) -> str:
        if uri and not re.fullmatch(r"s3://[^/]+/.*[^/]/*", uri):
            raise ValueError("must be s3://bucket/prefix")
        return uri.rstrip("/")

    @property
    def store_root(self) -> Path:
        """The embedded object store."""
        return self.home / "store"

    @property
    def failures(self) -> Path:
        """What training ranks that failed had to say."""
        return self.home / "failures"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of training jobs that have not ended."""
        return self.home / "checkpoints"

    @property
    def serving(self) -> Path:
        """What vLLM and its reconciler share: public names, state and logs."""
        return self.home / "serving"

    @property
    def endpoint(self) -> str:
        """Base URL of the OpenAI-compatible API."""
        return f"{self.serving_url.rstrip('/') or f'http://127.0.0.1:{self.serving_port}'}/v1"


def load_settings() -> Settings:
    """Read the settings, or raise Problems naming each variable that is wrong or unknown."""
    problems = []
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX) and variable not in known and not variable.startswith(NO_SETTINGS):
            near = difflib.get_close_matches(variable, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            problems.append(f"{variable}: no such setting; {meant}")
    try:
        settings = Settings()
    except ValidationError as error:
        for finding in error.errors():
            name = PREFIX + str(finding["loc"][0]).upper()
            problems.append(f"{name}={finding['input']}: {finding['msg'].lower()}")
    if problems:
        raise Problems("The settings (FORGE_* environment variables) are wrong:", problems)
    return settings.model_copy(update={"home": settings.home.expanduser().absolute()})
