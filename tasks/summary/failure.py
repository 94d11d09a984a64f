"""What is said, and given back, when the pipeline has failed."""

import os

from tasks.errors import ForgeError
from tasks.recipe import load_recipe
from tasks.registry import CHALLENGER, REGISTERED_BY, open_registry, telling, version_of
from tasks.settings import Settings
from tasks.storage import open_store
from tasks.storage.lease import give_up, whoami


def describe(stage: str, message: str, inputs: dict[str, str], settings: Settings) -> str:
    """On the cluster: what failed, with what, where to look, and how to go on."""
    project, domain, name = (
        os.environ.get(f"FLYTE_INTERNAL_EXECUTION_{part}", "") for part in ("PROJECT", "DOMAIN", "ID")
    )
    given = ", ".join(f"{key} {value!r}" for key, value in inputs.items())
    return "\n".join(
        [
            f"training_pipeline failed in {stage or 'a stage that Flyte does not name'}, given {given}:",
            *(f"  {line}" for line in message.strip().splitlines()),
            f"logs: kubectl -n {project}-{domain} logs -l execution-id={name} --all-containers --prefix --tail=-1",
            f"checkpoints: {settings.checkpoint_copies or settings.checkpoints}",
            f"go on from what is done: flytectl create execution -p {project} -d {domain} --recover {name}",
        ]
    )


def describe_here(inputs: dict[str, str], settings: Settings) -> str:
    """On this machine, where the error itself is shown after this: what a run with the same inputs goes on from."""
    if not settings.checkpoints.is_dir() or not any(settings.checkpoints.iterdir()):
        return ""
    given = " ".join(f"--{key} {value}" for key, value in inputs.items() if value)
    return f"The same command ({given}) goes on from the checkpoints in {settings.checkpoints}"


def give_back(recipe: str, settings: Settings) -> list[str]:
    """End what this execution holds of the recipe's model, so that nobody waits for it; returns what was done."""
    done = []
    try:
        name = load_recipe(recipe).name
        if claims := give_up(open_store(settings), f"promotion-{name}"):
            done.append(f"{claims} claim{'s' * (claims > 1)} on the promotion of {name}")
        client = open_registry(settings)
        with telling(f"the aliases of {name} cannot be told", settings):
            known = client.search_registered_models(f"name = '{name}'")
            version = version_of(client, name, CHALLENGER) if known else None
            if version and client.get_model_version(name, version).tags.get(REGISTERED_BY) == whoami():
                client.delete_registered_model_alias(name, CHALLENGER)
                done.append(f"the alias {CHALLENGER} of {name} version {version}")
    except ForgeError as error:
        done.append(f"nothing more, for {error.message}")
    return done
