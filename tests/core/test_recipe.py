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
        ("items: 512", "items: 0", 16, "greater than or equal to 1"),
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
        ("evaluation:", "evaluatio:", 15, "did you mean evaluation?"),
    ],
)
def test_errors_name_the_line(old: str, new: str, line: int, says: str, tmp_path: Path) -> None:
    message = error_of_changed(old, new, tmp_path)
    assert f"{tmp_path / 'wrong.yaml'}:{line}: " in message
    assert says in message


def error_of_changed(old: str, new: str, tmp_path: Path) -> str:
    """The error of a shipped recipe with a change."""
    path = tmp_path / "wrong.yaml"
    text = (RECIPES / "tiny-cpu.yaml").read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ForgeError) as caught:
        load_recipe(str(path))
    return caught.value.message


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


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name: &a [*a]\n", "wrong.yaml:1: not valid YAML: nested too deeply"),
        (BOMB, "more than 10,000 values are too many for a recipe"),
        (f"{BOMB}? *a11\n: 1\n", "wrong.yaml:12: not valid YAML: a key must be a word"),
        ("name: x\n" * 20_000, "160,000 bytes are too many for a recipe"),
        ("- " * 5000, "nested too deeply"),
        ("\nseed: !!int x\n", "wrong.yaml:2: not valid YAML: not of type int"),
        ("\nseed: !!bool x\n", "wrong.yaml:2: not valid YAML: not of type bool"),
        ("seed: !!timestamp x\n", "wrong.yaml:1: not valid YAML: !!timestamp is not read; remove it"),
        ("name: !!python/object/apply:os.system [ls]\n", "!!python/object/apply:os.system is not read; remove it"),
        ("seed: " + "9" * 5000, "wrong.yaml:1: not valid YAML: not of type int"),
        ("seed: 0x" + "f" * 5000, "wrong.yaml:1: not valid YAML: the number is out of range"),
        ('name: "\\ud83d"\n', "wrong.yaml:1: not valid YAML: the text holds half a character"),
        ('"\\ud83d": 1\n', "half a character"),
        ("name: a\0b\n", "not valid YAML: "),
    ],
)
def test_yaml_that_is_no_recipe_is_one_error(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ForgeError) as caught:
        load_recipe(str(path))
    assert f"recipe {path}" in caught.value.message
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("name: dates", "name: 12", "name: Input should be a valid string (got 12); put it in quotes"),
        ("learning_rate: 0.0025", "learning_rate: .inf", "learning_rate: Input should be a finite number (got inf)"),
        ("epochs: 1", "epochs: .nan", "epochs: Input should be a finite number (got nan)"),
        ("precision: fp32", "seed: '9223372036854775808'", "seed: Input should be less than"),
        ("items: 512", f"check: {{kind: regex, pattern: '{'(' * 3000}'}}", "pattern is not a regular expression"),
        ("items: 512", "check: {kind: number, tolerance: .inf}", "tolerance: Input should be a finite number"),
        ("source: demonstration", f"source: [{'x' * 9000}]", "source: Input should be a valid string (got ['xxx"),
    ],
)
def test_values_that_no_run_can_use(old: str, new: str, says: str, tmp_path: Path) -> None:
    message = error_of_changed(old, new, tmp_path)
    assert says in message
    assert len(message) < 2000


def test_a_date_in_a_recipe_is_a_text() -> None:
    text = yaml.safe_dump(SMALL).replace("name: dates", "name: 2024-01-01")
    assert load_recipe(text).name == "2024-01-01"


def test_anchors_in_a_recipe_are_read() -> None:
    text = yaml.safe_dump(SMALL | {"name": "a"}).replace("name: a", "name: &name a")
    text = text.replace("source: demonstration", "source: *name")
    with pytest.raises(ForgeError, match="undefined alias"):  # data comes before name
        load_recipe(text)
    assert load_recipe("name: &name a\n" + text.replace("name: &name a\n", "")).data.source == "a"


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("x" * 300, "cannot be read (File name too long)"),
        ("\udcff: 1\na: 1\n", "not UTF-8 text (byte 1); save it as UTF-8"),
        ("a\0b", "neither a shipped recipe nor a file"),
    ],
)
def test_a_recipe_with_an_impossible_name(recipe: str, says: str) -> None:
    with pytest.raises(ForgeError) as caught:
        load_recipe(recipe)
    assert says in caught.value.message
