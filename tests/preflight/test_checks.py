"""Preflight reports all problems together, with their fixes."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
import yaml

from forge.cluster import gpus, nodes
from forge.core.contracts import Base
from forge.core.digest import digest_directory
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import ModelRecipe, Recipe, TrainingRecipe
from forge.core.settings import Settings, load_settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.packages import LocalBase
from forge.registry.promotion import promote
from forge.serving.desired import Serving
from forge.serving.rollout_check import check_rollout
from forge.serving.vllm_environment import vllm_release
from forge.storage import open_store
from tasks.preflight.checks import check_all
from tasks.preflight.model_checks import check_memory, check_training, find_base, trained_config
from tasks.preflight.service_checks import check_cluster_settings, check_vllm
from tasks.preprocess import sample
from tests.conftest import SMALL, chat, write_jsonl


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture
def free_port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("FORGE_SERVING_PORT", str(port))
    return port


def test_a_valid_recipe_and_valid_rows_pass(recipe_file: Path, free_port: int, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    recipe, source, base = check_all(str(rows), str(recipe_file))
    assert (source.uri, base) == (rows.as_uri(), Base())
    assert recipe.data.source == f"sha256-{source.digest}"
    assert check_all(rows.as_uri(), str(recipe_file)) == (recipe, source, base)
    assert check_all("", str(recipe_file))[1].uri == "demonstration"


def test_all_problems_are_reported_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SMALL).replace("learning_rate", "learning_rat"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("no json\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("FORGE_SERVING_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("FORGE_HOME", "/proc/forge")  # where not even root can create a directory
        monkeypatch.setenv("FORGE_SERVING_PYTHON", "/nowhere/python")
        with pytest.raises(Problems) as caught:
            check_all(str(rows), str(recipe))
    for part in (
        "did you mean learning_rate?", "rows.jsonl:1: not valid JSON", "cannot be written",
        "vLLM is not installed for /nowhere/python: run make setup", "is in use by another program",
    ):  # fmt: skip
        assert part in caught.value.message
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"max_seq_len": 64, "demonstration": {"locales": ["en", "xx"]}}}, "Babel does not know xx"),
        ({"data": {"max_seq_len": 64, "demonstration": {"rows": 200_000, "locales": ["en"]}}}, "only 109575 rows"),
        ({"model": {"base": "/nowhere/model"}}, "base model /nowhere/model"),
        (
            {
                "model": {
                    "architecture": {"hidden_size": 32768, "layers": 64, "heads": 256, "intermediate_size": 99_999}
                }
            },
            "training does not fit: one process needs",
        ),
    ],
)
def test_a_recipe_that_cannot_run_here_is_rejected(change: dict, says: str, tmp_path: Path, free_port: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **change}))
    with pytest.raises(Problems) as caught:
        check_all("", str(path))
    assert says in caught.value.message


def test_adapters_can_be_trained_without_a_gpu() -> None:
    lora = TrainingRecipe.model_validate({**SMALL["training"], "method": "lora", "lora": {}})
    assert check_training(lora) == []


def test_training_is_checked_against_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    two = TrainingRecipe.model_validate({**SMALL["training"], "nproc_per_node": 2})
    monkeypatch.setattr(gpus, "find_gpus", lambda: [gpus.GPUS["A100-40GB"]])
    with pytest.raises(ForgeError, match=r"nproc_per_node 2: each process takes a GPU, and this machine has 1; lower"):
        check_training(two)
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123456789")  # a pod of the cluster, itself without a GPU
    assert check_training(two) == gpus.gpus_of(nodes.TRAINING)


def test_a_shape_that_the_cluster_lacks_is_rejected_there(monkeypatch: pytest.MonkeyPatch) -> None:
    four = TrainingRecipe.model_validate({**SMALL["training"], "nodes": 2, "nproc_per_node": 2, "global_batch_size": 4})
    monkeypatch.setattr(gpus, "find_gpus", lambda: [])
    assert check_training(four) == [], "on one machine, four processes train side by side"
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123456789")
    assert check_training(four) == gpus.gpus_of(nodes.TRAINING)
    one = [node for node in nodes.all_nodes() if node.pool != "secondary"]
    monkeypatch.setattr(nodes, "all_nodes", lambda: one)
    with pytest.raises(
        ForgeError, match=r"nodes 2 with training.nproc_per_node 2: 1 of the cluster's nodes of role train"
    ):
        check_training(four)


def test_a_shape_without_a_task_is_rejected_only_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TrainingRecipe.model_validate({**SMALL["training"], "nodes": 2, "nproc_per_node": 4})
    monkeypatch.setattr(gpus, "find_gpus", lambda: [])
    assert check_training(recipe) == [], "one machine runs any number of processes"
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123456789")
    with pytest.raises(ForgeError, match=r"nodes 2 with training.nproc_per_node 4: .*; take one of 1x1, 1x2, 2x2"):
        check_training(recipe)
    monkeypatch.setattr(nodes, "SHAPES", (*nodes.SHAPES, nodes.TrainingShape(2, 4)))
    with pytest.raises(ForgeError, match=r"0 of the cluster's nodes of role training have 4 GPUs .*; lower training"):
        check_training(recipe)


def test_a_cluster_needs_the_settings_of_all_services(monkeypatch: pytest.MonkeyPatch) -> None:
    check_cluster_settings(Settings(), rollout=True)
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123456789")
    with pytest.raises(ForgeError, match="lack FORGE_STORE, FORGE_MLFLOW_URI, FORGE_CHECKPOINT_COPIES, FORGE_S3_"):
        check_cluster_settings(Settings(), rollout=True)
    complete = Settings(
        store="s3://forge/store", mlflow_uri="http://mlflow", checkpoint_copies="s3://forge/checkpoints",
        s3_endpoint="http://minio:9000",
    )  # fmt: skip
    with pytest.raises(ForgeError, match=r"lack FORGE_SERVING_TARGET=kubernetes .*, FORGE_SERVING_URL, FORGE_RECON"):
        check_cluster_settings(complete, rollout=True)
    check_cluster_settings(complete, rollout=False)
    serving = {"serving_target": "kubernetes", "serving_url": "http://v:1", "reconciler_url": "http://r:1"}
    check_cluster_settings(complete.model_copy(update=serving), rollout=True)


def test_a_shape_above_the_quota_of_the_namespace_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123456789")
    four = TrainingRecipe.model_validate({**SMALL["training"], "nodes": 2, "nproc_per_node": 2, "global_batch_size": 4})
    with pytest.raises(ForgeError, match=r"needs 4 GPUs, and the quota of this namespace allows 2 .*; lower training"):
        check_training(four, Settings(gpu_quota=2))
    assert check_training(four, Settings(gpu_quota=4)) == gpus.gpus_of(nodes.TRAINING)
    assert check_training(four, Settings()) == gpus.gpus_of(nodes.TRAINING)


def test_a_cluster_rejects_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    text = yaml.safe_dump({**SMALL, "model": {"base": str(tmp_path / "base")}})
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123456789")
    with pytest.raises(Problems) as caught:
        check_all(str(rows), text)
    for what in (f"data {rows}", f"base model {tmp_path / 'base'}"):
        assert (
            f"{what}: is a path, and the pods of a cluster share no disk; copy it to the store" in caught.value.message
        )


def test_on_a_cluster_vllm_and_port_of_this_pod_are_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123456789")
    monkeypatch.setenv("FORGE_SERVING_TARGET", "kubernetes")
    monkeypatch.setenv("FORGE_SERVING_PYTHON", "/nowhere/python")  # as in the images, which have no vLLM
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("FORGE_SERVING_PORT", str(taken.getsockname()[1]))
        with pytest.raises(Problems) as caught:
            check_all("", yaml.safe_dump(SMALL))
    assert "vLLM is not installed" not in caught.value.message
    assert "in use by another program" not in caught.value.message
    assert "FORGE_SERVING_URL" in caught.value.message, "settings of the rollout are checked"


def test_without_rollouts_no_server_is_needed_and_the_name_has_the_suffix(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_ROLLOUT", "false")
    monkeypatch.setenv("FORGE_NAME_SUFFIX", "-development")
    monkeypatch.setenv("FORGE_SERVING_PYTHON", "/nowhere/python")
    recipe, _, _ = check_all("", str(recipe_file))
    assert (recipe.name, recipe.serving.rollout) == ("dates-development", False)
    monkeypatch.setenv("FORGE_ROLLOUT", "true")
    with pytest.raises(Problems, match="vLLM is not installed"):
        check_all("", str(recipe_file))
    text = yaml.safe_dump({**SMALL, "serving": {"rollout": False}})
    assert check_all("", text)[0].serving.rollout is False


def test_a_base_model_must_fit(tmp_path: Path) -> None:
    def check(available: list[gpus.GPU], **changes: int) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**large, **changes}))
        recipe = Recipe.model_validate({**SMALL, "model": {"base": str(tmp_path)}})
        check_memory(recipe, trained_config(recipe, LocalBase(str(tmp_path))), available)

    large = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    small, great = gpus.GPUS["A100-40GB"], gpus.GPUS["H200-141GB"]
    check([great], num_hidden_layers=16)
    with pytest.raises(ForgeError, match=r"A100-40GB has 38\.0 GiB"):
        check([great, small], num_hidden_layers=16)


def test_the_trained_model_must_fit_the_serving_gpus(tmp_path: Path) -> None:
    settings = Settings()

    def check(rank: int = 16, **serving: int) -> None:
        training = {**SMALL["training"], "precision": "bf16", "method": "lora", "lora": {"rank": rank}}
        model = {"base": str(tmp_path)}
        recipe = Recipe.model_validate({**SMALL, "model": model, "training": training, "serving": serving})
        base, config = Base(location="owner/llama", revision="0" * 40), trained_config(recipe, LocalBase(str(tmp_path)))
        check_rollout(recipe, base, config, Serving(), settings)

    llama = {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(llama))
    check(max_model_len=4096)
    with pytest.raises(ForgeError, match=r"adapter of rank 32: .* take serving\.max_lora_rank 32"):
        check(rank=32, max_model_len=4096)
    check(rank=32, max_model_len=4096, max_lora_rank=32)
    settings = Settings(serving_target="kubernetes")
    with pytest.raises(ForgeError, match=r"each of 2 x A100-40GB needs .*; it fits with .* or with 4-bit AWQ weights"):
        check(max_model_len=4096)
    (tmp_path / "config.json").write_text(json.dumps({**llama, "num_hidden_layers": 16}))
    check(max_model_len=4096)


def test_a_path_in_the_recipe_becomes_a_uri(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**SMALL, "data": {"source": "rows.jsonl", "max_seq_len": 64}})
    )
    assert check_all("", "recipe.yaml")[1].uri == (tmp_path / "rows.jsonl").as_uri()


def test_a_base_model_needs_safetensors(tmp_path: Path) -> None:
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    base = find_base(ModelRecipe(base=str(directory)))
    assert base == Base(location=directory.as_uri(), revision=digest_directory(directory)[0])
    assert find_base(ModelRecipe(base=base.location, revision=base.revision)) == base
    with pytest.raises(ForgeError, match="its digest is"):
        find_base(ModelRecipe(base=str(directory), revision="another"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ForgeError, match="pickled weights are not loaded"):
        find_base(ModelRecipe(base=str(tmp_path)))


def test_a_python_without_vllm_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="vLLM is not installed"):
        check_vllm(Settings(home=tmp_path, serving_python=Path(sys.executable)))
    assert re.fullmatch(r"vllm(-cpu)? \d+\.\d+\.\d+\S*", vllm_release(Settings(home=tmp_path).serving_python))


def test_only_the_first_rows_are_read(recipe_file: Path, free_port: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 2)
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b"), chat("c", "d")])
    path.write_text(path.read_text() + "no json\n")
    check_all(str(path), str(recipe_file))
    monkeypatch.setattr(sample, "SAMPLE", 3)
    with pytest.raises(Problems, match=r"rows.jsonl:3"):
        check_all(str(path), str(recipe_file))


def test_invalid_rows_within_the_allowed_share_pass(recipe_file: Path, free_port: int, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*[chat(f"{n}", "b") for n in range(200)], "no row"])
    check_all(str(path), str(recipe_file))


def test_a_separate_held_out_source_is_checked_and_pinned(free_port: int, tmp_path: Path) -> None:
    rows, own = tmp_path / "rows.jsonl", tmp_path / "own.jsonl"
    write_jsonl(rows, [{"text": "Once upon a time."}])
    write_jsonl(own, [chat("a", "b")])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SMALL, "data": {"max_seq_len": 64, "heldout_source": str(own)}}))
    _, source, _ = check_all(str(rows), str(recipe))
    assert source.heldout == own.as_uri()
    write_jsonl(own, [chat("a", "c")])
    assert check_all(str(rows), str(recipe))[1].digest != source.digest
    own.write_text("no json\n")
    with pytest.raises(Problems, match=r"own.jsonl:1: not valid JSON"):
        check_all(str(rows), str(recipe))


def test_plain_texts_alone_cannot_be_evaluated(recipe_file: Path, free_port: int, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Once upon a time."}])
    with pytest.raises(Problems, match=r"give conversations in data.heldout_source"):
        check_all(str(rows), str(recipe_file))


def test_mixed_row_formats_are_rejected(recipe_file: Path, free_port: int, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows" / "a.jsonl", [chat("a", "b")])
    write_jsonl(tmp_path / "rows" / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(Problems, match=r"b.jsonl:1 is prompt, and .*a.jsonl:1 is chat"):
        check_all(str(tmp_path / "rows"), str(recipe_file))


def test_a_champion_without_its_package_is_reported(recipe_file: Path, free_port: int, tmp_path: Path) -> None:
    client = open_registry(load_settings())
    client.create_registered_model(SMALL["name"])
    version = client.create_model_version(SMALL["name"], source=(tmp_path / "missing").as_uri())
    promote(client, open_store(load_settings()), SMALL["name"], str(version.version), "", "a test")
    with pytest.raises(Problems, match=r"champion dates version 1: store: .*/missing is gone, .*; restore it, or"):
        check_all("", str(recipe_file))
