"""Training an adapter on a registered champion, and packaging it as the next version."""

import dataclasses
import json
import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from forge.core.contracts import Base, Champion, Dataset, Evaluation, Model, Source, Version
from forge.core.digest import digest_directory
from forge.core.errors import ForgeError
from forge.core.recipe import Lora, ModelRecipe, Recipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import find_champion, open_registry
from forge.registry.packages import fetch_package, local_base, open_package
from forge.registry.promotion import promote
from forge.storage import Store, open_store
from tasks.evaluate import answer_cache
from tasks.evaluate.champion import champion_model, find_package, merged_champion
from tasks.evaluate.evaluate import evaluate, evaluated_base
from tasks.finetune.process_group import Rank
from tasks.finetune.run import train
from tasks.preflight.checks import check_all
from tasks.preflight.model_checks import find_base
from tasks.preprocess.prepare import prepare
from tasks.preprocess.sources import digest_source
from tasks.preprocess.task import prepare_whole
from tasks.register.history import lineage
from tasks.register.register import register
from tests.conftest import SMALL, Trained
from tests.finetune.job import run, write_recipe

ONLY_RANK = Rank(0, 1, torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A champion with full weights, and a run on it that packaged an adapter. Tests must not change it."""

    settings: Settings
    store: Store
    recipe: Recipe
    first: Version
    base: Base
    dataset: Dataset
    model: Model
    evaluation: Evaluation
    version: Version

    @property
    def package(self) -> Path:
        return fetch_package(self.version.uri, self.settings, self.store)

    @property
    def champion(self) -> Champion:
        return Champion(version=self.version.version, uri=self.version.uri, digest=self.version.digest)


@pytest.fixture(scope="module")
def adapted(trained: Trained, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A few steps of LoRA on the champion, in a home of its own."""
    settings = Settings(home=tmp_path_factory.mktemp("adapted"))
    store, client = open_store(settings), open_registry(settings)
    first = register(recipe, trained.dataset, trained.model, trained.evaluation, settings, store)
    promote(client, store, recipe.name, first.version, "", "a test")
    training = {"method": "lora", "lora": Lora(rank=4), "epochs": 0.2, "learning_rate": 0.01, "precision": "bf16"}
    recipe = recipe.model_copy(
        update={
            "model": ModelRecipe(base="models:/dates@champion"),
            "training": recipe.training.model_copy(update=training),
        }
    )
    base = find_base(recipe.model, settings, store)
    source = Source(uri="demonstration", digest=digest_source(recipe.data), store=store.identity)
    dataset = prepare(source, recipe.data, base, store, settings)
    model = train(ONLY_RANK, dataset, base, recipe.model, recipe.training, store, settings)
    assert model is not None
    champion = find_champion(client, recipe.name) or Champion()
    evaluation = evaluate(recipe.name, dataset, model, champion, recipe.evaluation, recipe.gate, store, settings)
    version = register(recipe, dataset, model, evaluation, settings, store)
    return Adapted(settings, store, recipe, first, base, dataset, model, evaluation, version)


def test_run_starts_from_the_weights_tokenizer_and_template_of_the_champion(adapted: Adapted, trained: Trained) -> None:
    assert adapted.base == Base(location=adapted.first.uri, revision=adapted.first.digest)
    card, first_card = (
        json.loads((adapted.store.path(dataset.uri) / "dataset.json").read_text())
        for dataset in (adapted.dataset, trained.dataset)
    )
    for key in ("tokenizer_digest", "template_digest", "tokens"):
        assert card[key] == first_card[key]
    card = json.loads((adapted.store.path(adapted.model.uri) / "training.json").read_text())
    before = json.loads((trained.store.path(trained.model.uri) / "training.json").read_text())["curve"]
    assert card["curve"][0]["loss"] < 1.2 * before[-1]["loss"]
    assert adapted.model.base == Base(**card["base"]) == adapted.base
    assert card["recipe"]["model"]["base"] == "models:/dates@champion"
    assert adapted.evaluation.champion == "1"
    assert adapted.evaluation.score_base == adapted.evaluation.score_champion == trained.evaluation.score
    _, digest = evaluated_base(adapted.model, adapted.settings, adapted.store)
    assert digest == digest_directory(trained.store.path(trained.model.uri) / "model")[0], "its answers are cached"


def test_preprocessing_task_opens_the_base(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_HOME", str(adapted.settings.home))
    source = Source(uri="demonstration", digest=digest_source(adapted.recipe.data), store=adapted.store.identity)
    assert prepare_whole(source=source, data=adapted.recipe.data, base=adapted.base).digest == adapted.dataset.digest


def test_training_without_flyte_starts_from_a_registered_model(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_HOME", str(adapted.settings.home))
    path = write_recipe(tmp_path / "recipe.yaml", Path("models:/dates@champion"), epochs=0.1)
    run(path, adapted.store.path(adapted.dataset.uri), tmp_path / "out", processes=1)
    assert Base(**json.loads((tmp_path / "out" / "training.json").read_text())["base"]) == adapted.base


def test_adapter_is_packaged_without_its_base(adapted: Adapted) -> None:
    _, manifest = open_package(adapted.version.uri, adapted.version.digest, adapted.settings, adapted.store)
    assert (manifest["kind"], manifest["rank"], manifest["dtype"]) == ("adapter", 4, "bfloat16")
    assert Base(**manifest["base"]) == adapted.base
    whole = adapted.store.path(adapted.model.uri) / "model"
    assert manifest["model_digest"] == digest_directory(whole)[0]
    paths = {file["path"] for file in manifest["files"]}
    assert paths == {"README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    config = json.loads((adapted.package / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"models/dates/sha256-{adapted.first.digest}"
    assert str(adapted.settings.home) not in json.dumps(config)
    head = yaml.safe_load((adapted.package / "README.md").read_text().split("---\n")[1])
    assert (head["library_name"], "base_model" in head) == ("peft", False)
    assert all("lora_" in name for name in load_file(adapted.package / "adapter_model.safetensors"))
    first = open_package(adapted.first.uri, adapted.first.digest, adapted.settings, adapted.store)[1]
    assert (first["kind"], "rank" in first) == ("model", False)


def test_registering_an_adapter_twice_gives_one_version(adapted: Adapted) -> None:
    inputs = (adapted.recipe, adapted.dataset, adapted.model, adapted.evaluation, adapted.settings, adapted.store)
    assert register(*inputs).version == adapted.version.version == "2"


def test_lineage_names_the_base_of_an_adapter(adapted: Adapted) -> None:
    history = lineage("models:/dates/2", adapted.settings, adapted.store)
    assert history["package"]["kind"] == "adapter"
    assert history["base"] == {"location": "models:/dates/1", "revision": adapted.first.digest}


def _merged_champion(adapted: Adapted, home: Path) -> tuple[str, str]:
    settings = adapted.settings.model_copy(update={"home": home})
    champion = champion_model("dates", adapted.champion, "another", adapted.store, settings)
    assert champion is not None
    return champion[0].location, champion[1]


def test_adapter_merges_into_the_evaluated_model(adapted: Adapted, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        (place, digest), again = pool.starmap(_merged_champion, [(adapted, tmp_path)] * 2)
    assert (place, digest) == again
    assert digest == digest_directory(adapted.store.path(adapted.model.uri) / "model")[0]
    assert champion_model("dates", adapted.champion, digest, adapted.store, adapted.settings) is None
    (Path(place) / "config.json").write_text("{}")
    with pytest.raises(ForgeError, match=r"merged/.*config.json is damaged; delete the package and run again"):
        _merged_champion(adapted, tmp_path)


def test_adapter_on_a_directory_requires_it_unchanged(adapted: Adapted, trained: Trained, tmp_path: Path) -> None:
    directory = trained.store.path(trained.model.uri) / "model"
    settings = Settings(home=tmp_path)
    _, manifest = open_package(adapted.version.uri, adapted.version.digest, adapted.settings, adapted.store)
    base = {"location": str(directory), "revision": digest_directory(directory)[0]}
    changed = {**manifest, "base": {**base, "revision": "0" * 64}}
    with pytest.raises(ForgeError, match="is missing or has changed"):
        merged_champion(adapted.package, changed, settings, adapted.store)
    whole = merged_champion(adapted.package, {**manifest, "base": base}, settings, adapted.store)
    assert digest_directory(whole, exclude={"manifest.json"})[0] == manifest["model_digest"]


def test_model_is_compared_with_an_adapter_champion(
    adapted: Adapted, trained: Trained, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_registry(adapted.settings)
    promote(client, adapted.store, "dates", "2", "1", "a test")
    try:
        champion = find_champion(client, "dates")
        assert champion is not None
        assert champion.uri == adapted.version.uri

        def never(*arguments: object) -> None:
            raise AssertionError("the champion was run again")

        monkeypatch.setattr(answer_cache, "answer_with_transformers", never)
        inputs = (champion, recipe.evaluation, recipe.gate, adapted.store, adapted.settings)
        assert "already the champion" in evaluate("dates", trained.dataset, adapted.model, *inputs).reason
        monkeypatch.undo()
        evaluation = evaluate("dates", trained.dataset, trained.model, *inputs)
        assert (evaluation.champion, evaluation.score_champion) == ("2", adapted.evaluation.score)
    finally:
        promote(client, adapted.store, "dates", "1", "2", "a test")


@pytest.mark.parametrize(
    ("base", "revision", "message"),
    [
        ("models:/dates/2", None, "models:/dates/2 is an adapter, .*use its base instead: models:/dates/1$"),
        ("models:/words@champion", None, "words has no champion yet; train one first, with model.architecture"),
        ("models:/dates/9", None, r"base model models:/dates/9: no such version"),
        ("models:/dates", None, "write it as models:/name@champion"),
        ("models:/dates@champion", "0" * 64, "its digest is [0-9a-f]{64}, and model.revision is 0000"),
    ],
)
def test_unusable_base_is_an_error(adapted: Adapted, base: str, revision: str | None, message: str) -> None:
    with pytest.raises(ForgeError, match=message):
        find_base(ModelRecipe(base=base, revision=revision), adapted.settings, adapted.store)


def test_base_can_be_named_by_version_or_uri_with_its_digest(adapted: Adapted) -> None:
    for name in ("models:/dates/1", adapted.first.uri):
        recipe = ModelRecipe(base=name, revision=adapted.first.digest)
        assert find_base(recipe, adapted.settings, adapted.store) == adapted.base


def test_preflight_finds_a_registered_base(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_HOME", str(adapted.settings.home))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FORGE_SERVING_PORT", str(probe.getsockname()[1]))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "model": {"base": "models:/dates@champion"}}))
    assert check_all("", str(path))[2] == adapted.base


def test_damaged_base_is_found_before_training(adapted: Adapted, tmp_path: Path) -> None:
    weights = fetch_package(adapted.first.uri, adapted.settings, adapted.store) / "model.safetensors"
    whole = weights.read_bytes()
    training = adapted.recipe.training.model_copy(update={"seed": 1})  # which has not been trained yet
    weights.unlink()  # it is a hard link to the trained model
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for attempt in (
            lambda: find_base(adapted.recipe.model, adapted.settings, adapted.store),
            lambda: local_base(adapted.base, adapted.settings, adapted.store),
            lambda: train(
                ONLY_RANK, adapted.dataset, adapted.base, adapted.recipe.model, training, adapted.store,
                adapted.settings.model_copy(update={"home": tmp_path}),
            ),
            lambda: _merged_champion(adapted, tmp_path),
        ):  # fmt: skip
            with pytest.raises(ForgeError, match=r"model\.safetensors is damaged"):
                attempt()
        assert not (tmp_path / "checkpoints").exists()
    finally:
        weights.unlink()
        weights.write_bytes(whole)


def test_champion_with_a_missing_base_is_an_error(adapted: Adapted, tmp_path: Path) -> None:
    package = fetch_package(adapted.first.uri, adapted.settings, adapted.store)
    package.rename(tmp_path / "moved")
    try:
        with pytest.raises(ForgeError, match=f"champion dates version 2: store: {adapted.first.uri} is gone"):
            find_package("dates", adapted.champion, adapted.store)
    finally:
        (tmp_path / "moved").rename(package)
