"""The registry in a home with an odd name, and on a full disk."""

from pathlib import Path

import pytest

from forge.core.full_disk import DiskFull
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry, translate_mlflow_errors
from forge.registry.mlflow_runs import experiment_id
from tests.storage.disks import enlarge, small_disk


@pytest.mark.parametrize("name", ["größe", "100%", "50%41", "a?b=c", "a#b", "it's +&"])
def test_a_home_may_have_any_name(name: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / name)
    client = open_registry(settings)
    run_id = client.create_run(experiment_id(client, "dates", settings)).info.run_id
    report = tmp_path / "report.html"
    report.write_text("content", encoding="utf-8")
    client.log_artifact(run_id, str(report))
    client.create_registered_model("dates")
    assert [model.name for model in open_registry(settings).search_registered_models()] == ["dates"]
    assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["report.html"]
    assert (tmp_path / name / "mlflow" / "mlflow.db").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {name, "report.html"}, "nothing is written elsewhere"


def test_a_registry_that_does_not_fit_is_created_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        settings = Settings(home=disk / "home")
        with pytest.raises(DiskFull, match=rf"^disk {disk}: is full \(.*\): the embedded registry cannot be written"):
            open_registry(settings)
        assert not list(disk.rglob("*.db*"))
        enlarge(disk, "8m")
        assert open_registry(settings).search_registered_models() == []


def test_a_record_that_does_not_fit_is_one_message(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        settings = Settings(home=disk / "home")
        client = open_registry(settings)
        experiment = experiment_id(client, "dates", settings)
        (disk / "other").write_bytes(bytes(7_000_000))
        with pytest.raises(DiskFull, match="is full"), translate_mlflow_errors("it could not be recorded", settings):
            for _ in range(2000):
                client.create_run(experiment, tags={"reason": "x" * 4000})
        (disk / "other").unlink()
        assert client.create_run(experiment).info.status == "RUNNING"
