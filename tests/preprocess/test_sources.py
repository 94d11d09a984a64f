"""Rows are found wherever users have them, and only they: behind links, percent signs, and next to hidden files."""

from pathlib import Path

import pytest

from forge.core.contracts import Base
from forge.core.errors import Problems
from forge.core.settings import load_settings
from forge.storage import DirectoryStore
from tasks.preflight.data_checks import absolute_uri, check_data
from tasks.preprocess.prepare import prepare
from tests.conftest import chat, write_jsonl
from tests.preprocess.datasets import card_of, data_recipe, prepare_file, source_of
from tests.storage.servers import KEY, SECRET, client_of, shared_server

COUNT = 20


def rows_about(word: str) -> list[dict]:
    return [chat(f"{word} {n}", "b") for n in range(COUNT)]


def test_rows_in_a_linked_directory_are_read(store: DirectoryStore, tmp_path: Path) -> None:
    """https://github.com/huggingface/datasets/issues/6764"""
    write_jsonl(tmp_path / "rows" / "a.jsonl", rows_about("own"))
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", rows_about("linked"))
    (tmp_path / "rows" / "more").symlink_to(tmp_path / "elsewhere")
    dataset = prepare_file(tmp_path / "rows", store)
    assert card_of(dataset, store)["rows"] == 2 * COUNT
    check_data(data_recipe(tmp_path / "rows"))
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", [{"question": "none"}] * COUNT)
    with pytest.raises(Problems, match=r"more/b\.jsonl:1: .*no conversation"):
        check_data(data_recipe(tmp_path / "rows"))


def test_a_uri_with_percent_signs_is_its_file(store: DirectoryStore, tmp_path: Path) -> None:
    """https://github.com/UKGovernmentBEIS/inspect_ai/issues/5064"""
    path = write_jsonl(tmp_path / "my räws + 100%.jsonl", rows_about("own"))
    assert "%20r%C3%A4ws" in path.as_uri()
    assert absolute_uri(path.as_uri()) == absolute_uri(str(path)) == path.as_uri()
    recipe, _ = check_data(data_recipe(path))
    assert recipe.source == path.as_uri()
    assert card_of(prepare_file(path, store), store)["rows"] == COUNT


def test_hidden_files_are_left_out_of_a_bucket_as_of_a_directory(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """https://github.com/apache/spark/pull/1924"""
    server = shared_server("moto")
    for name, value in (("ENDPOINT", server), ("ACCESS_KEY", KEY), ("SECRET_KEY", SECRET)):
        monkeypatch.setenv(f"FORGE_S3_{name}", value)
    client = client_of(server)
    client.make_bucket("with-hidden-files")
    words = {"a 1+é.jsonl": "good", "_temporary/0/b.jsonl": "half", ".ipynb_checkpoints/a.jsonl": "old"}
    for name, word in words.items():
        path = write_jsonl(tmp_path / "raw" / name, rows_about(word))
        client.fput_object("with-hidden-files", f"raw/{name}", str(path))
    local = prepare_file(tmp_path / "raw", store)
    assert card_of(local, store)["rows"] == COUNT
    recipe = data_recipe(tmp_path / "raw", source="s3://with-hidden-files/raw")
    assert prepare(source_of(recipe, store), recipe, Base(), store, load_settings()).digest == local.digest
