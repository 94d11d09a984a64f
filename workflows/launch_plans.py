"""What runs by schedule on a cluster. Cron is in UTC."""

from flytekit import CronSchedule, LaunchPlan

from workflows.registry import retention

registry_retention = LaunchPlan.get_or_create(
    retention,
    name="registry_retention",
    default_inputs={"name": "", "keep": 10, "days": 30.0},
    fixed_inputs={"apply": True},
    schedule=CronSchedule(schedule="0 9 * * 0"),  # Sundays at 6 in Sao Paulo, when nothing trains
)
