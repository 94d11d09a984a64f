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
from tasks.finetune.checkpoint_mirror import Bucket
from tasks.finetune.export import export
from tasks.finetune.process_group import Rank
from tasks.finetune.telemetry import Telemetry
from tasks.finetune.train import Trainer, TrainingJob

log = logging.getLogger(__name__)

STAGE = "finetune"
# What of a training recipe says how it is run, and not what it comes to: a job goes on where another of these changed.
HOW = frozenset(
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

    A job that was broken off goes on from its last checkpoint, and one whose model was published is not done again.
    """
    started = time.time()
    key = job_key(dataset.digest, base, model, recipe)
    checkpoints, copies = settings.checkpoints / key, copies_of(key, settings)
    # The first rank looks for all: what another finds may differ, and each waits for the others in training.
    done = find_completed(store, STAGE, [key], Model) if rank.first else None
    if rank.first_says(done is not None):
        if done is not None:
            log.info(f"{done.uri} was published before; nothing is left to train")
            Checkpoints(checkpoints, replace(rank, world=1), recipe.keep_checkpoints, copies).remove()
        return done
    local = local_base(base, settings, store)
    job = TrainingJob(store.path(dataset.uri), local, model, recipe, checkpoints, copies, origin=base)
    trainer = Trainer(rank, job)
    with telemetry_of(trainer, settings, name=job.checkpoints.name) as telemetry:
        trainer.train(telemetry)
    if not rank.first:
        export(trainer, None)
        return None
    with store.stage() as staged:
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
def telemetry_of(trainer: Trainer, settings: Settings, name: str) -> Iterator[Telemetry | None]:
    """The first rank's telemetry, where the settings name an MLflow server or a port for Prometheus."""
    if not trainer.rank.first or not (settings.mlflow_uri or settings.metrics_port):
        yield None
        return
    job = trainer.job
    params = {**job.training.model_dump(mode="json"), "base": job.origin.location or "random weights"}
    per_token, peak = trainer.flops()
    with Telemetry(
        settings, name, params, training=name, steps=trainer.order.steps, device=trainer.rank.device,
        flops_per_token=per_token, peak_flops=peak,
    ) as telemetry:  # fmt: skip
        yield telemetry


def copies_of(key: str, settings: Settings) -> Bucket | None:
    """Where a job's checkpoints are copied to, if anywhere."""
    return Bucket(f"{settings.checkpoint_copies}/{key}", settings) if settings.checkpoint_copies else None


def job_key(dataset: str, base: Base, model: ModelRecipe, recipe: TrainingRecipe) -> str:
    """What decides a job's result (its data set's digest among it), in 16 hexadecimal digits."""
    parts = [base.model_dump(), model.model_dump(mode="json"), recipe.model_dump(mode="json", exclude=set(HOW))]
    return digest_json([dataset, *parts])[:16]
