"""MLflow, where runs and model versions are recorded: opened here, and nowhere else.

The embedded registry is SQLite under .forge/. Its tables are made once, under a lock: processes that make them
side by side break the database for good.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from filelock import FileLock

from forge.core.contracts import Champion
from forge.core.errors import ForgeError
from forge.core.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
REGISTERED_BY = "registered_by"  # the tag of a version: whose run it is of
CHALLENGER = "challenger"  # the version that was registered last and does not serve yet
PACKAGE_DIGEST = "package_digest"  # the tag of a version: of all files of its package
MODEL_DIGEST = "model_digest"  # the tag of a version and of its run: of the model's files alone
EVALUATION = "evaluation_digest"  # the tag of a version: of the evaluation that the gate let through
TIMEOUT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def tracking_uri(settings: Settings) -> str:
    """The MLflow server of the settings, or the embedded database."""
    return settings.mlflow_uri or f"sqlite:///{settings.home / 'mlflow' / 'mlflow.db'}"


def artifact_root(settings: Settings) -> str | None:
    """Where the embedded registry keeps artifacts; None leaves it to the server."""
    return None if settings.mlflow_uri else (settings.home / "mlflow" / "artifacts").as_uri()


def open_registry(settings: Settings) -> "MlflowClient":
    """A client of the registry, made first if it is the embedded one; ForgeError where it cannot be reached."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, value in TIMEOUT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = tracking_uri(settings)
    lock = settings.home / "mlflow" / "lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            client = MlflowClient(uri, registry_uri=uri)
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(f"MLflow {uri}: cannot be used ({reason}); start it, or mend FORGE_MLFLOW_URI") from None
    return client


@contextlib.contextmanager
def translate_mlflow_errors(what: str, settings: Settings) -> Iterator[None]:
    """What MLflow raises becomes a ForgeError that says what could not be done."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(f"MLflow {tracking_uri(settings)}: {what} ({reason}); mend it and run again") from None


def find_champion(client: "MlflowClient", name: str) -> Champion | None:
    """The champion of a name, where the name is registered and has one."""
    if not client.search_registered_models(f"name = '{name}'"):
        return None
    version = champion_version(client, name)
    if version is None:
        return None
    found = client.get_model_version(name, version)
    return Champion(
        version=version,
        uri=found.source or "",
        digest=found.tags.get(PACKAGE_DIGEST, ""),
        run_id=found.run_id or "",
    )


def champion_version(client: "MlflowClient", name: str) -> str | None:
    """The version that the alias champion names, or None."""
    return version_of(client, name, CHAMPION)


def version_of(client: "MlflowClient", name: str, alias: str) -> str | None:
    """The version that an alias names, or None."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)  # the embedded registry gives numbers, a server texts
