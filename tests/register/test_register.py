"""Registration on a real MLflow (SQLite): one model is one package, run and version, even if repeated."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from forge.core.contracts import Version
from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.packages import fetch_package
from forge.storage import DirectoryStore, open_store
from forge.storage.manifest import verify
from tasks.register import register as module
from tasks.register.register import register
from tests.conftest import Trained
from tests.register.packages import inputs
from tests.registry.test_packages import keys


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "registry")


def register_once(trained: Trained, recipe: Recipe, settings: Settings, name: str = "dates") -> Version:
    named = recipe.model_copy(update={"name": name})
    return register(named, trained.dataset, trained.model, trained.evaluation, settings, trained.store)


def test_a_version_refers_to_everything_it_was_built_from(trained: Trained, recipe: Recipe, settings: Settings) -> None:
    version = register_once(trained, recipe, settings)
    client = open_registry(settings)
    found = client.get_model_version("dates", version.version)
    assert found.source == version.uri
    assert found.tags["package_digest"] == version.digest
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.004"
    assert run.data.metrics["exact_match"] == trained.evaluation.exact_match
    assert len(client.get_metric_history(version.run_id, "loss")) > 1
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == trained.dataset.digest[:36]
    assert [artifact.path for artifact in client.list_artifacts(version.run_id)] == ["report.html"]
    report = trained.store.path(trained.evaluation.report)
    assert report.read_text() in [p.read_text() for p in settings.home.rglob("report.html")]
    manifest = json.loads((trained.store.path(version.uri) / "manifest.json").read_text())
    assert manifest["dataset"] == trained.dataset.digest
    assert {file["path"] for file in manifest["files"]} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_repeated_registration_gives_the_same_version(trained: Trained, recipe: Recipe, settings: Settings) -> None:
    first, again = register_once(trained, recipe, settings), register_once(trained, recipe, settings)
    assert (first.version, first.digest, first.run_id) == (again.version, again.digest, again.run_id)
    client = open_registry(settings)
    assert len(client.search_model_versions("name = 'dates'")) == 1
    assert len(client.search_runs([run_experiment(client)])) == 1


def test_an_unsigned_version_is_signed_when_it_is_registered_again(
    recipe: Recipe, settings: Settings, tmp_path: Path
) -> None:
    given = inputs(tmp_path, settings, recipe)
    first = given.register(settings)
    signing = settings.model_copy(update=keys(tmp_path))
    with pytest.raises(ForgeError, match="is not signed"):
        fetch_package("models:/dates/1", signing, open_store(signing))
    assert given.register(signing).digest == first.digest
    fetch_package("models:/dates/1", signing, open_store(signing))


def run_experiment(client) -> str:
    return client.get_experiment_by_name("dates").experiment_id


@pytest.mark.parametrize("dies_in", ["log_batch", "set_terminated", "create_registered_model", "create_model_version"])
def test_an_interrupted_registration_is_completed(
    dies_in: str, trained: Trained, recipe: Recipe, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCut(BaseException):
        pass

    def cut(settings: Settings):
        client = open_registry(settings)

        def die(*arguments: object, **options: object) -> None:
            raise PowerCut

        setattr(client, dies_in, die)
        return client

    monkeypatch.setattr(module, "open_registry", cut)
    with pytest.raises(PowerCut):
        register_once(trained, recipe, settings)
    monkeypatch.undo()
    monkeypatch.setenv("FORGE_HOME", str(settings.home))
    register_once(trained, recipe, settings)
    client = open_registry(settings)
    assert len(client.search_model_versions("name = 'dates'")) == 1
    (run,) = client.search_runs([run_experiment(client)])
    assert run.info.status == "FINISHED"


def test_another_model_gets_a_new_version(trained: Trained, recipe: Recipe, settings: Settings, tmp_path: Path) -> None:
    first = register_once(trained, recipe, settings)
    store = DirectoryStore(tmp_path / "store")
    changed = tmp_path / "changed"
    shutil.copytree(trained.store.path(trained.model.uri), changed)
    (changed / "model" / "generation_config.json").write_text("{}")
    model = trained.model.model_copy(update={"uri": changed.as_uri()})
    second = register(recipe, trained.dataset, model, trained.evaluation, settings, store)
    assert (first.version, second.version) == ("1", "2")
    assert first.digest != second.digest


@pytest.mark.parametrize("damage", ["damaged", "missing", "not in the manifest"])
def test_a_damaged_package_is_rejected_and_the_file_named(
    damage: str, trained: Trained, recipe: Recipe, settings: Settings, tmp_path: Path
) -> None:
    version = register_once(trained, recipe, settings)
    package = tmp_path / "package"
    shutil.copytree(trained.store.path(version.uri), package)
    verify(package, version.digest)
    file = package / ("extra.json" if damage == "not in the manifest" else "config.json")
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("{}")
    with pytest.raises(ForgeError, match=f"{file.name} is {damage}"):
        verify(package, version.digest)


def test_a_package_with_another_digest_is_rejected(trained: Trained, recipe: Recipe, settings: Settings) -> None:
    version = register_once(trained, recipe, settings)
    with pytest.raises(ForgeError, match="its digest is"):
        verify(trained.store.path(version.uri), "0" * 64)


def _open(home: str) -> bool:
    return open_registry(Settings(home=Path(home))) is not None


def test_processes_can_create_the_registry_concurrently(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_open, [str(tmp_path / "fresh")] * 2) == [True] * 2


def test_an_unreachable_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ForgeError, match=r"MLflow http://127\.0\.0\.1:9: cannot be used"):
        open_registry(Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:9"))
