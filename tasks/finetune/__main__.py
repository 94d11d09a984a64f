"""Training without Flyte: `torchrun --nproc_per_node=2 -m tasks.finetune --recipe R --data D --out O`."""

import argparse
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from forge.core.contracts import Base
from forge.core.errors import ForgeError
from forge.core.logs import start_logging
from forge.core.settings import Settings, load_settings, path_of
from forge.registry.packages import LocalBase, is_registered, local_base, registered_base
from forge.storage import open_store
from forge.storage.recipes import load_recipe
from tasks.finetune.export import export
from tasks.finetune.process_group import Rank, process_group
from tasks.finetune.run import job_key, open_mirror, open_telemetry
from tasks.finetune.train import Trainer, TrainingJob

log = logging.getLogger("tasks.finetune")  # this module's own name is __main__


def main() -> int:
    """Train a recipe on a prepared data set. The output directory appears when the model is complete."""
    parser = argparse.ArgumentParser(prog="python -m tasks.finetune", description=main.__doc__)
    parser.add_argument("--recipe", required=True, help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--data", type=Path, required=True, help="directory of a data set (with dataset.json)")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    options = parser.parse_args()
    start_logging("train")
    try:
        recipe, settings = load_recipe(options.recipe), load_settings()
        card = options.data / "dataset.json"
        if not card.is_file():
            raise ForgeError("not a prepared data set (it has no dataset.json)", where=str(options.data))
        if options.out.exists():
            raise ForgeError("already exists", where=str(options.out), fix="name another directory, or remove it")
        checkpoints = options.out.with_name(f"{options.out.name}.checkpoints")
        name, revision, store = recipe.model.base or "", recipe.model.revision or "", open_store(settings)
        if is_registered(name):
            base = registered_base(name, revision, settings, store)
            local = LocalBase(str(store.path(base.location)))  # verified by registered_base
        else:
            directory = path_of(name).expanduser().absolute()
            base = Base(location=directory.as_uri() if name and directory.is_dir() else name, revision=revision)
            local = local_base(base, settings, store)
        key = job_key(json.loads(card.read_text(encoding="utf-8"))["digest"], base, recipe.model, recipe.training)
        mirror = open_mirror(key, settings)
        job = TrainingJob(options.data, local, recipe.model, recipe.training, checkpoints, mirror, origin=base)
        # One file per launcher: an earlier failure is not this one's.
        with process_group(options.out.with_name(f"{options.out.name}.failure-{os.getppid()}.json")) as rank:
            train(rank, job, options.out, settings)
    except ForgeError as error:
        log.error(error.message)
        return 1
    return 0


def train(rank: Rank, job: TrainingJob, out: Path, settings: Settings) -> None:
    """Train, and rename the exported model to `out` when it is complete."""
    trainer = Trainer(rank, job)
    with open_telemetry(trainer, settings, name=out.name) as telemetry:
        trainer.train(telemetry)
    if not rank.first:
        export(trainer, None)
        return
    staged = out.with_name(f"{out.name}.partial")
    if staged.exists():
        shutil.rmtree(staged)
    export(trainer, staged)
    os.rename(staged, out)
    trainer.checkpoints.remove()
    log.info(f"wrote the model to {out}; {trainer.tokens_per_second():,.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
