"""Rollback by an operator. On a real vLLM: tests/integration/test_story.py and test_serving.py."""

from pathlib import Path

from forge.core.recipe import ServingRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from tasks.rollout.rollback import recipe_of


def test_a_version_is_served_with_the_options_of_its_own_recipe(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    client = open_registry(settings)
    client.create_registered_model("dates")
    run = client.create_run(client.create_experiment("dates"))
    recipe = ServingRecipe(max_model_len=4096, max_lora_rank=64, min_agreement=0.5, replay=3)
    for name, value in recipe.model_dump(mode="json").items():  # as the register stage does
        client.log_param(run.info.run_id, f"serving.{name}", str(value))
    client.log_param(run.info.run_id, "serving.of_an_older_release", "x")
    version = client.create_model_version("dates", source="file:///nowhere", run_id=run.info.run_id)
    assert recipe_of(version, settings) == recipe
    assert recipe_of(client.create_model_version("dates", source="file:///nowhere"), settings) == ServingRecipe()
