"""Registration, promotion, history and pruning with real MLflow servers and the store on an S3 server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import champion_version, open_registry
from forge.registry.packages import fetch_package
from forge.registry.promotion import promote
from forge.storage import open_store
from tasks.register.history import history, lineage
from tasks.register.pruning import prune
from tests.register.mlflow_servers import POSTGRES, mlflow_server, postgres
from tests.register.packages import inputs, machine

pytestmark = pytest.mark.long


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a machine whose registry is a server."""
    if request.param == "postgres":
        if not POSTGRES:
            pytest.skip("needs Postgres: apt-get install postgresql")
        with (
            postgres() as database,
            mlflow_server(database, tmp_path) as url,
            machine("rclone", tmp_path) as machine_settings,
        ):
            yield machine_settings.model_copy(update={"mlflow_uri": url})
    else:
        database = f"sqlite:///{tmp_path / 'mlflow.db'}"
        with mlflow_server(database, tmp_path) as url, machine("rclone", tmp_path) as machine_settings:
            yield machine_settings.model_copy(update={"mlflow_uri": url})


def test_a_server_works_like_the_embedded_registry(settings: Settings, recipe: Recipe, tmp_path: Path) -> None:
    store, client = open_store(settings), open_registry(settings)
    given = [inputs(tmp_path, settings, recipe, seed=bytes([number])) for number in range(3)]
    first, second, third = (one.register(settings) for one in given)
    assert [version.version for version in (first, second, third)] == ["1", "2", "3"]
    assert given[0].register(settings).version == "1", "the same version if repeated"
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["score"] == 0.75
    assert run.data.params["training.learning_rate"] == "0.004"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == "d" * 36
    report = client.download_artifacts(first.run_id, "report.html", str(tmp_path))
    assert "<p>" in Path(report).read_text()
    promote(client, store, "dates", "1", "", "better")
    promote(client, store, "dates", "2", "1", "better")
    assert champion_version(client, "dates") == "2"
    assert client.get_model_version("dates", "2").tags["previous_champion"] == "1"
    entries = history("dates", settings, store)
    assert [(entry.version, entry.aliases) for entry in entries] == [
        ("3", ()), ("2", ("champion",)), ("1", ()),
    ]  # fmt: skip
    assert lineage("models:/dates@champion", settings, store)["package"]["digest"] == second.digest
    assert fetch_package("models:/dates@champion", settings, store) == store.path(second.uri)
    promote(client, store, "dates", "3", "2", "better")
    (removal,) = prune("dates", 1, 0, True, settings, store)
    assert removal.versions == ("1",)
    assert [entry.version for entry in history("dates", settings, store)] == ["3", "2"]


def test_an_unreachable_server_is_one_message_and_the_next_attempt_succeeds(
    settings: Settings, recipe: Recipe, tmp_path: Path
) -> None:
    given = inputs(tmp_path, settings, recipe)
    unreachable = settings.model_copy(update={"mlflow_uri": "http://127.0.0.1:9"})
    with pytest.raises(ForgeError, match=r"MLflow http://127\.0\.0\.1:9: cannot be used"):
        given.register(unreachable)
    assert given.register(settings).version == "1"
