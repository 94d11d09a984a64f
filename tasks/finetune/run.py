"""One training job, from a data set to a published model."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace

from forge.core.contracts import Base, Dataset, Model
from forge.core.digest import digest_directory, digest_json
from forge.core.recipe import ModelRecipe, TrainingRecipe
from forge.core.settings import Settings
from forge.registry.packages import local_base
from forge.storage import Store
from forge.storage.completed import find_completed, record_completed
from tasks.finetune.checkpoint import Checkpoints
from tasks.finetune.checkpoint_mirror import CheckpointMirror
from tasks.finetune.export import export
from tasks.finetune.process_group import Rank
from tasks.finetune.telemetry import Telemetry
from tasks.finetune.train import Trainer, TrainingJob

log = logging.getLogger(__name__)

STAGE = "finetune"
# Fields of a training recipe that do not change its result: a job with other values of these resumes an earlier one.
EXECUTION_FIELDS = frozenset(
    ("nodes", "nproc_per_node", "parallelism", "micro_batch_size", "activation_checkpointing", "compile",
     "checkpoint_minutes", "checkpoint_steps", "keep_checkpoints", "max_skipped_steps", "gpu_temperature_limit")
)  # fmt: skip


def train(
    rank: Rank,
    dataset: Dataset,
    base: Base,
    model: ModelRecipe,
    recipe: TrainingRecipe,
    store: Store,
    settings: Settings,
) -> Model | None:
    """Train on a data set and publish the model; the first rank returns it.

    An interrupted job resumes from its last checkpoint. A job whose model was published before returns that model.
    """
    started = time.time()
    key = job_key(dataset.digest, base, model, recipe)
    checkpoints, mirror = settings.checkpoints / key, open_mirror(key, settings)
    # The first rank decides for all: if they found different things, some would wait for the others forever.
    done = find_completed(store, STAGE, [key], Model) if rank.first else None
    if rank.broadcast_from_first(done is not None):
        if done is not None:
            log.info(f"nothing to train: {done.uri} was published before")
            Checkpoints(checkpoints, replace(rank, world_size=1), recipe.keep_checkpoints, mirror).remove()
        return done
    local = local_base(base, settings, store)
    job = TrainingJob(store.path(dataset.uri), local, model, recipe, checkpoints, mirror, origin=base)
    trainer = Trainer(rank, job)
    with open_telemetry(trainer, settings, name=job.checkpoints.name) as telemetry:
        trainer.train(telemetry)
    if not rank.first:
        export(trainer, None)
        return None
    with store.stage("the trained model") as staged:
        export(trainer, staged)
        digest, _ = digest_directory(staged, exclude=("training.json",))
        uri = store.publish(staged, "trained")
        if not base.location:
            base = Base(location=f"{uri}/base")
        trained = Model(
            uri=uri, digest=digest, store=store.identity, base=base, started=started, seconds=time.time() - started
        )
        record_completed(store, STAGE, [key], trained)
    trainer.checkpoints.remove()
    return trained


@contextlib.contextmanager
def open_telemetry(trainer: Trainer, settings: Settings, name: str) -> Iterator[Telemetry | None]:
    """Telemetry on the first rank, if the settings name an MLflow server or a port for Prometheus."""
    if not trainer.rank.first or not (settings.mlflow_uri or settings.metrics_port):
        yield None
        return
    job = trainer.job
    params = {**job.training.model_dump(mode="json"), "base": job.origin.location or "random weights"}
    per_token, peak = trainer.flops()
    with Telemetry(
        settings, name, params, training=name, steps=trainer.sampler.steps, device=trainer.rank.device,
        flops_per_token=per_token, peak_flops=peak,
    ) as telemetry:  # fmt: skip
        yield telemetry


def open_mirror(key: str, settings: Settings) -> CheckpointMirror | None:
    """The mirror of a job's checkpoints, if the settings have a bucket for it."""
    return CheckpointMirror(f"{settings.checkpoint_copies}/{key}", settings) if settings.checkpoint_copies else None


def job_key(dataset: str, base: Base, model: ModelRecipe, recipe: TrainingRecipe) -> str:
    """Key of everything that a job's result depends on (`dataset` is a digest): 16 hexadecimal digits."""
    parts = [
        base.model_dump(),
        model.model_dump(mode="json"),
        recipe.model_dump(mode="json", exclude=set(EXECUTION_FIELDS)),
    ]
    return digest_json([dataset, *parts])[:16]
