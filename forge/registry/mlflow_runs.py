"""The runs in MLflow: their experiments, and the names of an evaluation's metrics."""

import logging
from typing import TYPE_CHECKING

from forge.core.contracts import Evaluation
from forge.core.settings import Settings
from forge.registry.mlflow_registry import artifact_root

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

EXPERIMENT = "forge-evaluation"  # the experiment of all evaluations
SCORE = "score"
METRICS = (SCORE, "score_base", "score_champion", "exact_match", "nll", "nll_base", "json_validity")
MAX_TEXT = 4000  # characters of a tag that MLflow accepts, rounded down


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation's metrics, by the names of its fields; without those that are None."""
    return {name: value for name in METRICS if (value := getattr(evaluation, name)) is not None}


def experiment_id(client: "MlflowClient", name: str, settings: Settings) -> str:
    """The ID of an experiment, which is created if it does not exist, and restored if somebody has deleted it.

    MLflow keeps a deleted experiment, and takes neither runs for it nor another one of its name.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_root(settings))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        log.warning(f"restored the experiment {name}, which had been deleted in MLflow")
    return experiment.experiment_id


def evaluation_experiment(settings: Settings) -> str:
    """The name of the evaluations' experiment, which differs between Flyte domains."""
    return EXPERIMENT + settings.name_suffix
