"""Access to MLflow, which records runs and model versions.

The embedded registry is a SQLite database under .forge/. Its tables are created under a lock, since processes that
create them concurrently damage the database permanently.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from forge.core.contracts import Champion
from forge.core.errors import ForgeError
from forge.core.full_disk import explain_full_disk
from forge.core.settings import Settings
from forge.storage.files import remove_stale_staging, staged_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"  # the version that was registered last and does not serve yet
# Tags of versions
REGISTERED_BY = "registered_by"  # the owner of the run
PACKAGE_DIGEST = "package_digest"  # of all files of the package
MODEL_DIGEST = "model_digest"  # of the model's files only; the run has this tag, too
EVALUATION = "evaluation_digest"  # of the evaluation that passed the gate
DATABASE = "mlflow.db"
TIMEOUT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def tracking_uri(settings: Settings) -> str:
    """The URI of the MLflow server in the settings, or of the embedded database."""
    return settings.mlflow_uri or _sqlite(settings.home / "mlflow" / DATABASE)


def _sqlite(path: Path) -> str:
    """The URI of a database. MLflow takes a path after sqlite:/// as it is, and creates a directory of that name."""
    return "sqlite+pysqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def artifact_root(settings: Settings) -> str | None:
    """Where the embedded registry keeps artifacts; None if a server decides."""
    return None if settings.mlflow_uri else (settings.home / "mlflow" / "artifacts").as_uri()


def configure_client() -> None:
    """Set MLflow's timeouts, telemetry and log levels, before it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, value in TIMEOUT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


def open_registry(settings: Settings) -> "MlflowClient":
    """A client of the registry. Creates the embedded one if need be; raises ForgeError if it cannot be reached."""
    configure_client()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = tracking_uri(settings)
    lock = settings.home / "mlflow" / "lock"
    try:
        with explain_full_disk(lock.parent, "the embedded registry"):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if not settings.mlflow_uri:
                    _create_tables(lock.with_name(DATABASE))
                return _client(uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0]
        fix = "start it, or correct FORGE_MLFLOW_URI"
        if not settings.mlflow_uri:
            fix = "make its directory writable, or set FORGE_HOME or FORGE_MLFLOW_URI"
        raise ForgeError(f"cannot be used ({reason})", where=f"MLflow {uri}", fix=fix) from None


def _create_tables(database: Path) -> None:
    """Create the embedded registry if it does not exist, whole: MLflow never completes one that lacks tables."""
    staging = database.with_name(".staging")
    remove_stale_staging(staging)
    if database.exists():
        return
    staging.mkdir(exist_ok=True)
    with staged_directory(staging, "the embedded registry") as staged:
        _client(_sqlite(staged / DATABASE))
        (staged / DATABASE).replace(database)


def _client(uri: str) -> "MlflowClient":
    """A client that can reach both parts of MLflow. A database gets its tables."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    client.search_registered_models(max_results=1)
    return client


@contextlib.contextmanager
def translate_mlflow_errors(what: str, settings: Settings) -> Iterator[None]:
    """Turn errors of MLflow, and of a full disk, into a ForgeError that says what failed."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with explain_full_disk(settings.home / "mlflow", "the embedded registry"):
            yield
    except (MlflowException, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(
            f"{what} ({reason})", where=f"MLflow {tracking_uri(settings)}", fix="fix that and run again"
        ) from None


def find_champion(client: "MlflowClient", name: str) -> Champion | None:
    """The champion of a name; None if the name is not registered or has no champion."""
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
    """The version with the alias champion, or None."""
    return version_of(client, name, CHAMPION)


def version_of(client: "MlflowClient", name: str, alias: str) -> str | None:
    """The version with an alias, or None."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)  # the embedded registry returns an int
