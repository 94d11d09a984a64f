"""Shipped recipes are valid, and errors name the file, the line and the fix."""

import io
import json
import uuid
from pathlib import Path

import pytest
import yaml

from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from forge.storage.recipes import RECIPES, load_recipe
from tests.conftest import SMALL
from tests.storage.servers import KEY, MAKES, SECRET, client_of, shared_server

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_the_documented_recipes_are_shipped() -> None:
    assert {"tiny-cpu", "llama-3.1-8b-lora", "llama-3.1-8b-full", "llama-3.1-70b-qlora"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model.base is None or recipe.model.revision, "base models on the Hub are pinned to a commit"


def test_a_path_and_a_uri_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    assert load_recipe(str(path)) == load_recipe(path.as_uri())


def test_a_recipe_can_be_given_as_yaml() -> None:
    text = yaml.safe_dump(SMALL)
    assert load_recipe(text) == load_recipe(json.dumps(SMALL)) == Recipe.model_validate(SMALL)
    with pytest.raises(ForgeError, match=r"recipe given as YAML is wrong:\n.*given as YAML:\d+: .* did you mean items"):
        load_recipe(text.replace("items:", "itemz:"))


@pytest.mark.parametrize("make", MAKES)
def test_a_recipe_in_a_bucket_is_read(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = yaml.safe_dump(SMALL).encode()
    server = shared_server(make)
    client = client_of(server)
    bucket = f"recipes-{uuid.uuid4().hex[:8]}"
    client.make_bucket(bucket)
    client.put_object(bucket, "team/mine.yaml", io.BytesIO(text), len(text))
    for name, value in {"ENDPOINT": server, "ACCESS_KEY": KEY, "SECRET_KEY": SECRET}.items():
        monkeypatch.setenv(f"FORGE_S3_{name}", value)
    assert load_recipe(f"s3://{bucket}/team/mine.yaml") == Recipe.model_validate(SMALL)
    with pytest.raises(ForgeError, match=r"other.yaml: there is no such object; check the bucket and the key"):
        load_recipe(f"s3://{bucket}/team/other.yaml")


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("learning_rate", "learning_rat", 12, "did you mean learning_rate?"),
        ("max_seq_len: 256", "max_seq_len: ten", 5, "data.max_seq_len"),
        ("items: 512", "items: 0", 15, "greater than or equal to 1"),
        ("name: dates", "name: My Model", 2, "name"),
        ("global_batch_size: 8", "global_batch_size: 9", 8, "multiple of nodes x nproc_per_node"),
        (
            "source: demonstration",
            "source: demonstration\n  source: other",
            5,
            "source is given twice (first in line 4)",
        ),
        ("heads: 4", "heads: 3", 7, "multiple of 32"),
        ("name: dates", "name: [dates", 3, "not valid YAML"),
        ("evaluation:", "evaluatio:", 14, "did you mean evaluation?"),
    ],
)
def test_errors_name_the_line(old: str, new: str, line: int, says: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    text = (RECIPES / "tiny-cpu.yaml").read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ForgeError) as caught:
        load_recipe(str(path))
    assert f"{path}:{line}: " in caught.value.message
    assert says in caught.value.message


def test_answers_must_be_shorter_than_rows(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text((RECIPES / "tiny-cpu.yaml").read_text().replace("max_new_tokens: 48", "max_new_tokens: 256"))
    with pytest.raises(ForgeError, match=r"max_new_tokens must be less than data\.max_seq_len \(256\)"):
        load_recipe(str(path))


def test_all_errors_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        (RECIPES / "tiny-cpu.yaml").read_text().replace("epochs: 1", "epochs: -1").replace("layers: 3", "layer: 3")
    )
    with pytest.raises(ForgeError) as caught:
        load_recipe(str(path))
    for part in ("training.epochs", "model.architecture.layer: unknown key; did you mean layers?", "layers is missing"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny-cp", "Did you mean tiny-cpu?"),
        ("/nowhere.yaml", "Shipped are"),
        ("s3://b/r.yaml", "S3 needs a server"),
        ("hf://b/r.yaml", "only s3:// and file://"),
    ],
)
def test_a_missing_recipe(name: str, says: str) -> None:
    with pytest.raises(ForgeError, match="recipe") as caught:
        load_recipe(name)
    assert says in caught.value.message


@pytest.mark.parametrize("content", [b"", b"- a list\n", b"\xff\xfe"])
def test_a_file_that_is_not_a_recipe(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ForgeError) as caught:
        load_recipe(str(path))
    assert str(path) in caught.value.message
