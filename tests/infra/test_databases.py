"""The manifests' scripts that create and dump the databases, run on a real Postgres."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from infra.check.tree import Tree, at
from tests.register.mlflow_servers import POSTGRES, postgres

pytestmark = pytest.mark.skipif(not POSTGRES, reason="Postgres is missing: apt-get install postgresql")
PASSWORDS = {"flyte": 'of-flyte\'s "own"', "mlflow": "of$mlflow"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment for Postgres' client tools, with the password files next to it."""
    for name, password in PASSWORDS.items():
        (tmp_path / f"{name}-password").write_text(password)
    (tmp_path / "backup").mkdir()
    with postgres() as uri:
        place = urlsplit(uri)
        yield {
            **os.environ, "PATH": f"{POSTGRES}:{os.environ['PATH']}", "POSTGRES_USER": str(place.username),
            "PGHOST": str(place.hostname), "PGPORT": str(place.port), "PGDATABASE": "postgres",
        }  # fmt: skip


def query(server: dict[str, str], user: str, database: str, sql: str) -> str:
    """psql's output, including errors."""
    command = ["psql", "-U", user, "-d", database, "-Atc", sql]
    done = subprocess.run(command, env=server, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def run(script: str, server: dict[str, str], home: Path) -> None:
    """Run a container's script, with the container's paths replaced by local ones."""
    here = script.replace("/passwords", str(home)).replace("/backup/", f"{home}/backup/")
    here = here.replace("find /backup ", f"find {home}/backup ").replace("-h postgres ", "")
    subprocess.run(["bash", "-euc", here], env=server, check=True)


def test_each_user_owns_its_database_and_dumps_can_be_restored(
    tree: Tree, server: dict[str, str], tmp_path: Path
) -> None:
    scripts = {one["metadata"]["name"]: one for _, one in tree.of("ConfigMap", "CronJob")}
    run(scripts["postgres-init"]["data"]["databases.sh"], server, tmp_path)
    for name in PASSWORDS:
        assert query(server, name, name, "CREATE TABLE mine AS SELECT 42 AS n") == "SELECT 1"
    assert "permission denied for database" in query(server, "mlflow", "flyte", "SELECT 1")
    stored = query(server, "forge", "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = 'flyte'")
    assert stored.startswith("SCRAM-SHA-256$")

    old = tmp_path / "backup" / "flyte-2020-01-01.dump"
    old.touch()
    os.utime(old, (0, 0))
    job = at(scripts["postgres-backup"], "spec.jobTemplate.spec.template.spec.containers.0.command")
    run(job[-1], server, tmp_path)
    dumps = sorted((tmp_path / "backup").iterdir())
    assert [path.name.partition("-20")[0] for path in dumps] == ["flyte", "mlflow"]
    assert not old.exists()
    query(server, "flyte", "flyte", "DROP TABLE mine")
    restore = ["pg_restore", "--clean", "--if-exists", "-U", "flyte", "-d", "flyte", str(dumps[0])]
    subprocess.run(restore, env=server, check=True)
    assert query(server, "flyte", "flyte", "SELECT n FROM mine") == "42"
