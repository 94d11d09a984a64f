"""Settings come from FORGE_* variables, and errors name the variable."""

from pathlib import Path

import pytest

from forge.core.errors import Problems
from forge.core.settings import PROJECT, load_settings


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
