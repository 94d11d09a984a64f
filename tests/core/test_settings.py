"""Settings come from FORGE_* variables, and errors name the variable."""

import os
from pathlib import Path

import pytest

from forge.core.errors import Problems
from forge.core.settings import PROJECT, load_settings, path_of
from forge.storage import DirectoryStore


def test_defaults_are_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORGE_HOME")
    settings = load_settings()
    assert settings.home == PROJECT / ".forge"
    assert settings.endpoint == "http://127.0.0.1:8000/v1"


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_HOME", "somewhere")
    monkeypatch.setenv("FORGE_SERVING_PORT", "9001")
    settings = load_settings()
    assert settings.home == Path.cwd() / "somewhere"
    assert settings.serving_port == 9001


def test_all_wrong_and_unknown_variables_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_SERVING_PORT", "99999")
    monkeypatch.setenv("FORGE_SERVNG_PORT", "8000")
    with pytest.raises(Problems) as caught:
        load_settings()
    assert len(caught.value.problems) == 2
    assert "FORGE_SERVING_PORT=99999" in caught.value.message
    assert "FORGE_SERVNG_PORT: no such setting; did you mean FORGE_SERVING_PORT?" in caught.value.message


def test_s3_credentials_are_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().s3_endpoint == ""
    monkeypatch.setenv("FORGE_S3_ENDPOINT", "https://rows:9000")
    monkeypatch.setenv("FORGE_S3_ACCESS_KEY", "an-access-key")
    monkeypatch.setenv("FORGE_S3_SECRET_KEY", "a-secret-key")
    settings = load_settings()
    assert settings.s3_secret_key.get_secret_value() == "a-secret-key"
    assert "a-secret-key" not in f"{settings} {settings!r} {settings.model_dump_json()}"
    assert "an-access-key" not in f"{settings} {settings!r} {settings.model_dump_json()}"


@pytest.mark.parametrize("endpoint", ["rows:9000", "s3://rows", "http://", "http://rows:9000/path"])
def test_an_s3_endpoint_must_be_a_url(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("FORGE_S3_ENDPOINT", endpoint)
    with pytest.raises(Problems, match=f"FORGE_S3_ENDPOINT={endpoint}: .*must be http://host:port"):
        load_settings()


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "GPU_QUOTA", "ROLLOUT", "S3_REGION"):
        monkeypatch.setenv(f"FORGE_{name}", "")
    settings = load_settings()
    assert settings.home == PROJECT / ".forge"
    assert (settings.gpu_quota, settings.rollout, settings.s3_region) == (None, True, "us-east-1")


def test_a_tilde_is_the_user_s_home_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("HOME", "SIGNING_KEY", "VERIFY_KEY", "SERVING_PYTHON", "HARNESS_PYTHON")
    for name in names:
        monkeypatch.setenv(f"FORGE_{name}", f"~/a {name}")
    settings = load_settings()
    assert [getattr(settings, name.lower()) for name in names] == [tmp_path / f"a {name}" for name in names]
    monkeypatch.setenv("FORGE_HOME", "~nobody-of-this-name/forge")
    with pytest.raises(Problems, match="FORGE_HOME=~nobody-of-this-name/forge: could not determine home directory"):
        load_settings()


def test_bytes_that_are_no_text_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environb, b"FORGE_HOME", bytes(tmp_path) + b"/gr\xf6\xdfe")
    with pytest.raises(Problems, match=r"FORGE_HOME=.*: has characters that this locale lacks; set LC_ALL=C\.UTF-8"):
        load_settings()


@pytest.mark.parametrize("name", ["größe", "a b", "100%", "50%41", "a?b", "a#b", "it's", 'a"b', "a+b&c=d;e"])
def test_a_path_survives_its_uri(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "file"
    assert path_of(path.as_uri()) == path
    store = DirectoryStore(tmp_path / name / "store")
    with store.stage() as staged:
        (staged / name).write_text("content", encoding="utf-8")
        uri = store.publish(staged, "things")
    assert (store.path(uri) / name).read_text(encoding="utf-8") == "content"
    assert store.part(uri, name) == b"content"
    assert [found.uri for found in store.artifacts("things")] == [uri]
    store.remove(uri)
    assert store.artifacts("things") == []


def test_a_program_may_be_given_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_HARNESS_PYTHON", "python3.12")
    assert load_settings().harness_python == Path("python3.12")
