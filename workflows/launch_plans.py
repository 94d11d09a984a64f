"""Launch plans: scheduled runs, and one plan per shipped recipe to start by hand.

Cron schedules are in UTC, which is three hours ahead of the cluster's time zone (forge.cluster.nodes.TIME_ZONE) all
year. Each plan has one run at a time; if the next is due during a run, it is skipped. When plans are registered,
FORGE_NOTIFY says whom to notify of failures, and FORGE_STORE where Flyte stores its own values.
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

FAILURES = [WorkflowExecutionPhase.FAILED, WorkflowExecutionPhase.TIMED_OUT, WorkflowExecutionPhase.ABORTED]
ROWS = "s3://datasets/nightly"  # default data of the nightly run


def plan(name: str, workflow: Any, **more: Any) -> LaunchPlan:
    """A launch plan with the options common to all."""
    settings = load_settings()
    people = [address.strip() for address in settings.notify.split(",") if address.strip()]
    return LaunchPlan.get_or_create(
        workflow,
        name=name,
        labels=Labels({"app.kubernetes.io/part-of": "forge", "forge/plan": name}),
        max_parallelism=8,  # nodes of the workflow, including the shards of preprocessing
        concurrency=ConcurrencyPolicy(1, ConcurrencyLimitBehavior.SKIP),
        notifications=[Email(FAILURES, people)] if people else None,
        raw_output_data_config=RawOutputDataConfig(f"{settings.store}/flyte") if settings.store else None,
        **more,
    )


nightly_fine_tune = plan(
    "nightly_fine_tune",
    training_pipeline,
    default_inputs={"data_path": ROWS},
    fixed_inputs={"recipe": "llama-3.1-8b-lora"},
    schedule=CronSchedule(schedule="0 10 * * *"),  # 7:00 in Sao Paulo, when the training nodes stop serving
)
weekly_champion_check = plan(
    "weekly_champion_check",
    champion_check,
    default_inputs={"data_path": ROWS},
    fixed_inputs={"recipe": "llama-3.1-8b-lora"},
    schedule=CronSchedule(schedule="0 22 * * 0"),  # Sundays, 19:00 in Sao Paulo
)
registry_retention = plan(
    "registry_retention",
    retention,
    default_inputs={"name": "", "keep": 10, "days": 30.0},
    fixed_inputs={"apply": True},
    schedule=CronSchedule(schedule="0 9 * * 0"),  # Sundays, 6:00 in Sao Paulo, when nothing trains
)
# Started by hand; executions/ has examples for flytectl.
by_hand = [
    plan(f"train_{recipe.stem}", training_pipeline, fixed_inputs={"recipe": recipe.stem})
    for recipe in sorted(RECIPES.glob("*.yaml"))
]
