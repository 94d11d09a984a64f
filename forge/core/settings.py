"""Settings: FORGE_* environment variables that say where a run happens. By default everything is under .forge/.

What a run does is in the recipe.
"""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from forge.core.environment import complete_environment
from forge.core.errors import Problems

PROJECT = Path(__file__).resolve().parents[2]
PREFIX = "FORGE_"
NO_TEXT = "has characters that this locale lacks; set LC_ALL=C.UTF-8, and neither PYTHONUTF8 nor PYTHONIOENCODING"
NO_SETTINGS = ("FORGE_TEST_", "FORGE_RUN_ID")  # for the tests, and for forge.core.logs


def shipped(name: str) -> Path:
    """A file or folder that ships with the code, such as recipes: next to the code, or else on Python's path.

    Code that `pyflyte run --remote` uploads may lack it; then it comes from the image.
    """
    candidates = [PROJECT / name, *(Path(entry) / name for entry in sys.path if entry)]
    return next((path for path in candidates if path.exists()), candidates[0])


def path_of(name: str) -> Path:
    """The path that a file:// URI or a path names."""
    if not name.startswith("file://"):
        return Path(name)
    return Path(os.fsdecode(unquote_to_bytes(name.removeprefix("file://"))))  # as Path.as_uri encodes it


class Settings(BaseSettings):
    """Each field is read from FORGE_<FIELD NAME IN CAPITALS>; an empty variable is one that is not set."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    home: Path = Field(PROJECT / ".forge", description="Directory of the embedded store, registry and serving state")
    store: str = Field("", description="s3://bucket/prefix of the object store; empty: a directory under home")
    copies_gb: float = Field(100, gt=0, description="Size limit of the local copies of objects in the store, in GB")
    mlflow_uri: str = Field("", description="URL of the MLflow tracking server; empty: SQLite under home")
    signing_key: Path | None = Field(None, description="Private key (PEM, elliptic curve) to sign packages with")
    verify_key: Path | None = Field(
        None, description="Public key (PEM) to verify packages with; if set, unsigned packages are refused"
    )
    serving_python: Path = Field(
        PROJECT / ".venv-serving" / "bin" / "python", description="Python of the environment that has vLLM"
    )
    harness_python: Path = Field(
        PROJECT / ".venv-harness" / "bin" / "python",
        description="Python of the environment that has lm-evaluation-harness",
    )
    serving_port: int = Field(8000, ge=1024, le=65535, description="Port of the local OpenAI-compatible API")
    serving_target: Literal["local", "kubernetes"] = Field(
        "local", description="Where models are served: vLLM on this machine, or the cluster's Deployment vllm"
    )
    serving_url: str = Field("", description="URL of the cluster's vLLM, without /v1; empty: the local vLLM")
    serving_namespace: str = Field("ml-inference", description="Namespace of the cluster's vLLM")
    reconciler_url: str = Field("", description="URL of the cluster's reconciler; empty: the local reconciler")
    reconciler_port: int = Field(0, ge=0, le=65535, description="Port of the reconciler's status; 0: any free port")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of the Prometheus endpoint of a running training; 0: none"
    )
    checkpoint_copies: str = Field(
        "", description="s3://bucket/prefix to copy checkpoints to, so that a run can resume on another machine"
    )
    rollout: bool = Field(True, description="Roll out models that pass; false: runs end with a registered challenger")
    name_suffix: str = Field(
        "",
        pattern=r"^(-[a-z0-9-]+)?$",
        description="Suffix of the names of models and experiments, such as -development",
    )
    gpu_quota: int | None = Field(None, ge=0, description="GPU quota of the namespace that tasks run in")
    gpus: int = Field(
        0, ge=0, description="GPUs that a task's pod requested; the task fails if it sees fewer. Set by the pod itself"
    )
    notify: str = Field("", description="E-mail addresses to notify of failed runs, separated by commas")
    s3_endpoint: str = Field("", description="URL of the S3 server for s3:// URIs, such as http://host:9000")
    s3_access_key: SecretStr = Field(SecretStr(""), description="Access key of the S3 server")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="Secret key of the S3 server")
    s3_region: str = Field("us-east-1", description="Region of the S3 server")
    s3_virtual_host: bool = Field(
        False, description="Address buckets as http://bucket.host (virtual host) rather than http://host/bucket (path)"
    )

    @field_validator("home", "signing_key", "verify_key", "serving_python", "harness_python")
    @classmethod
    def _absolute(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None or (info.field_name in ("serving_python", "harness_python") and len(path.parts) == 1):
            return path  # the name of a program
        try:
            return path.expanduser().absolute()
        except RuntimeError as error:  # ~ without a home, or the ~name of nobody
            raise ValueError(str(error)) from None

    @field_validator("home")
    @classmethod
    def _directory(cls, path: Path) -> Path:
        nearest = next(one for one in (path, *path.parents) if os.path.lexists(one))
        if not os.path.isdir(nearest):
            raise ValueError(f"must be a directory, which {nearest} is not")
        return path

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
        """Error reports of failed training ranks."""
        return self.home / "failures"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of unfinished trainings."""
        return self.home / "checkpoints"

    @property
    def serving(self) -> Path:
        """Files of vLLM and its reconciler: public names, state and logs."""
        return self.home / "serving"

    @property
    def endpoint(self) -> str:
        """Base URL of the OpenAI-compatible API."""
        return f"{self.serving_url.rstrip('/') or f'http://127.0.0.1:{self.serving_port}'}/v1"


def load_settings() -> Settings:
    """Read the settings, and complete the environment for libraries. Raises Problems with each wrong variable."""
    problems = []
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for variable, value in sorted(os.environ.items()):
        if not variable.startswith(PREFIX):
            continue
        if variable not in known and not variable.startswith(NO_SETTINGS):
            similar = difflib.get_close_matches(variable, known, 1)
            hint = f"did you mean {similar[0]}?" if similar else f"the settings are {', '.join(sorted(known))}"
            problems.append(f"{variable}: no such setting; {hint}")
        elif not is_text(value):
            problems.append(f"{variable}={value}: {NO_TEXT}")
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name, message = PREFIX + str(problem["loc"][0]).upper(), problem["msg"].removeprefix("Value error, ")
            problems.append(f"{name}={problem['input']}: {message[0].lower()}{message[1:]}")
    if problems:
        raise Problems("The settings (FORGE_* environment variables) are wrong:", problems)
    complete_environment(settings.home / "user")
    return settings


def is_text(value: str) -> bool:
    """Whether a variable or an argument can be written as UTF-8. It may hold any bytes, since it may be a path."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
