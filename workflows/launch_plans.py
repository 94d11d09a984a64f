"""What runs on a cluster by schedule, and, for each shipped recipe, when somebody starts it.

Cron is in UTC, three hours ahead of the cluster's time zone (forge.cluster.nodes.TIME_ZONE) all year. Each plan runs
once at a time: what is due meanwhile is skipped. FORGE_NOTIFY and FORGE_STORE, when plans are registered, say who is
told of failures, and where Flyte's own values go.
"""

from typing import Any

from flytekit import ConcurrencyPolicy, CronSchedule, Email, LaunchPlan
from flytekit.models.common import Labels, RawOutputDataConfig
from flytekit.models.concurrency import ConcurrencyLimitBehavior
from flytekit.models.core.execution import WorkflowExecutionPhase

from forge.core.settings import load_settings
from forge.storage.recipes import RECIPES
from workflows.champion_check import champion_check
from workflows.registry import retention
from workflows.training_pipeline import training_pipeline

ENDED_BADLY = [WorkflowExecutionPhase.FAILED, WorkflowExecutionPhase.TIMED_OUT, WorkflowExecutionPhase.ABORTED]
ROWS = "s3://datasets/nightly"  # that the nightly run trains on, unless it is started with others


def plan(name: str, workflow: Any, **more: Any) -> LaunchPlan:
    """A launch plan with what all of them have."""
    settings = load_settings()
    people = [address.strip() for address in settings.notify.split(",") if address.strip()]
    return LaunchPlan.get_or_create(
        workflow,
        name=name,
        labels=Labels({"app.kubernetes.io/part-of": "forge", "forge/plan": name}),
        max_parallelism=8,  # shards that are read side by side, too
        concurrency=ConcurrencyPolicy(1, ConcurrencyLimitBehavior.SKIP),
        notifications=[Email(ENDED_BADLY, people)] if people else None,
        raw_output_data_config=RawOutputDataConfig(f"{settings.store}/flyte") if settings.store else None,
        **more,
    )


nightly_fine_tune = plan(
    "nightly_fine_tune",
    training_pipeline,
    default_inputs={"data_path": ROWS},
    fixed_inputs={"recipe": "llama-3.1-8b-lora"},
    schedule=CronSchedule(schedule="0 10 * * *"),  # at 7 in Sao Paulo, when its GPUs have served the night of others
)
weekly_champion_check = plan(
    "weekly_champion_check",
    champion_check,
    default_inputs={"data_path": ROWS},
    fixed_inputs={"recipe": "llama-3.1-8b-lora"},
    schedule=CronSchedule(schedule="0 22 * * 0"),  # Sundays at 19 in Sao Paulo
)
registry_retention = plan(
    "registry_retention",
    retention,
    default_inputs={"name": "", "keep": 10, "days": 30.0},
    fixed_inputs={"apply": True},
    schedule=CronSchedule(schedule="0 9 * * 0"),  # Sundays at 6 in Sao Paulo, when nothing trains
)
# Started by hand: executions/ has what flytectl wants for each.
by_hand = [
    plan(f"train_{recipe.stem}", training_pipeline, fixed_inputs={"recipe": recipe.stem})
    for recipe in sorted(RECIPES.glob("*.yaml"))
]
