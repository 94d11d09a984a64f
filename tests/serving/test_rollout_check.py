"""The checks of a rollout, which preflight runs before training, with the same messages."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.core.contracts import Base, Engine
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import Recipe, ServingRecipe
from forge.core.settings import PROJECT, Settings
from forge.serving.desired import Served, Serving, read_document
from forge.serving.rollout_check import check_rollout, state_after_rollout
from forge.storage.recipes import load_recipe
from tests.capacity.test_serving_memory import LLAMA_8B, LLAMA_70B, WEIGHTS_8B
from tests.conftest import SMALL
from tests.serving.states import adapter_of, serving, version

CLUSTER = Settings(
    serving_target="kubernetes", serving_url="http://vllm.serving:8000", reconciler_url="http://reconciler.serving:8001"
)
HUB = Base(location="meta-llama/Llama-3.1-8B-Instruct", revision="0e9e39f249a1")
SERVED_8B = Served(name="Llama-3.1-8B-Instruct", version="", uri=HUB.location, digest=HUB.revision)
OTHER = serving(version(1, "chat"))  # another base, under another public name


def recipe(method: str = "lora", precision: str = "bf16", rank: int = 16, **more: Any) -> Recipe:
    """A recipe that trains a full model or an adapter, under the name dates."""
    training = {**SMALL["training"], "precision": precision, "method": method}
    if method != "full":
        training["lora"] = {"rank": rank}
    model = {"base": HUB.location} if method != "full" else SMALL["model"]
    serving = {"max_model_len": 4096, **more}
    return Recipe.model_validate({**SMALL, "model": model, "training": training, "serving": serving})


def refusal(of: Recipe, now: Serving, base: Base = HUB, config: dict[str, Any] = LLAMA_8B) -> str:
    with pytest.raises(ForgeError) as refused:
        check_rollout(of, base, config, now, CLUSTER)
    assert refused.value.message.startswith("the rollout of dates would be refused: ")
    return refused.value.message


def with_8b(*adapters: Served, slots: int = 2) -> Serving:
    return serving(SERVED_8B, *adapters).model_copy(update={"engine": Engine(max_loras=slots, max_model_len=4096)})


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_is_loaded_on_the_current_base_or_brings_its_own(method: str) -> None:
    for now in (with_8b(), with_8b(version(2)), Serving()):
        check_rollout(recipe(method), HUB, LLAMA_8B, now, CLUSTER)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_names_are_not_removed_unless_the_recipe_replaces_them(method: str) -> None:
    message = refusal(recipe(method), OTHER)
    assert "would remove chat; list these names in serving.replaces, set serving.rollout: false" in message
    assert "000000" not in message, "the model has no digest before it is trained"
    check_rollout(recipe(method, replaces=["chat"]), HUB, LLAMA_8B, OTHER, CLUSTER)


def test_a_third_adapter_does_not_fit_two_slots() -> None:
    two = with_8b(version(2, "times"), version(3, "places"))
    assert "max_loras 2: 3 adapters are loaded together" in refusal(recipe(), two)
    check_rollout(recipe(max_loras=3), HUB, LLAMA_8B, two, CLUSTER)
    check_rollout(recipe(), HUB, LLAMA_8B, with_8b(*two.adapters, slots=3), CLUSTER)


def test_an_adapter_of_a_higher_rank_than_vllm_was_started_with_is_refused() -> None:
    assert "adapter of rank 64: the base is served with" in refusal(recipe(rank=64), with_8b())
    check_rollout(recipe(rank=64, max_lora_rank=64), HUB, LLAMA_8B, with_8b(), CLUSTER)


def test_a_model_that_does_not_fit_the_gpus_of_the_cluster_is_refused() -> None:
    assert "each of 2 x A100-40GB needs" in refusal(recipe(), Serving(), config=LLAMA_70B)
    tied = {**LLAMA_8B, "num_hidden_layers": 64}
    check_rollout(recipe("full"), Base(), tied, Serving(), CLUSTER)
    assert "each of 2 x A100-40GB needs" in refusal(recipe("full", "fp32"), Serving(), Base(), tied)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(Problems) as refused:
        check_rollout(recipe(rank=64, max_model_len=200_000), HUB, LLAMA_8B, Serving(), CLUSTER)
    assert len(refused.value.problems) == 2


def test_the_cluster_cannot_serve_a_directory_of_this_machine(tmp_path: Path) -> None:
    here = Base(location=tmp_path.as_uri(), revision="e" * 64)
    message = refusal(recipe(), Serving(), here)
    assert f"base model {tmp_path}: the cluster's vLLM cannot read a directory of this machine; train on" in message
    check_rollout(recipe(), here, LLAMA_8B, Serving(), Settings())


def test_a_rollout_and_preflight_agree() -> None:
    """The rollout knows the real digest and the size of the base; the rest is the same code."""
    served, manifest = version(4), {**adapter_of(SERVED_8B), "rank": 64}
    plain, wide = ServingRecipe(max_model_len=4096), ServingRecipe(max_model_len=4096, max_lora_rank=64)
    with pytest.raises(ForgeError) as late:
        state_after_rollout(with_8b(), served, manifest, plain, CLUSTER, lambda base: (LLAMA_8B, WEIGHTS_8B))
    assert refusal(recipe(rank=64), with_8b()).endswith(late.value.message)
    after, fit = state_after_rollout(with_8b(), served, manifest, wide, CLUSTER, lambda base: (LLAMA_8B, WEIGHTS_8B))
    assert (after.base, after.adapters, after.engine.tensor_parallel) == (SERVED_8B, (served,), 2)
    assert "of each of 2 x A100-40GB" in fit


def test_the_nightly_recipe_can_be_rolled_out_on_the_documented_cluster_twice() -> None:
    (shipped,) = yaml.safe_load_all((PROJECT / "infra/apps/ml-inference/vllm-base/desired.yaml").read_text())
    first = read_document(shipped["data"]["desired.json"], "desired.yaml").serving
    nightly = load_recipe("llama-3.1-8b-lora")
    base = Base(location=nightly.model.base or "", revision=nightly.model.revision or "")
    check_rollout(nightly, base, LLAMA_8B, first, CLUSTER)
    bare = nightly.serving.model_copy(update={"replaces": []})
    assert "would remove meta-llama/Meta-Llama-3.1-70B-Instruct" in refusal(
        nightly.model_copy(update={"serving": bare, "name": "dates"}), first, base
    )
    manifest = {"kind": "adapter", "base": base.model_dump(), "rank": 16}
    second, _ = state_after_rollout(
        first, version(1, nightly.name), manifest, nightly.serving, CLUSTER, lambda _: (LLAMA_8B, WEIGHTS_8B)
    )
    check_rollout(nightly, base, LLAMA_8B, second, CLUSTER)
