"""What is said where the pipeline has failed."""

import os
import textwrap

from forge.core.settings import Settings


def failure_message(stage: str, message: str, inputs: dict[str, str], settings: Settings) -> str:
    """On the cluster: what failed, with what, where to look, and how to go on."""
    project, domain, name = (
        os.environ.get(f"FLYTE_INTERNAL_EXECUTION_{part}", "") for part in ("PROJECT", "DOMAIN", "ID")
    )
    given = ", ".join(f"{key} {value!r}" if "\n" not in value else f"{key} as YAML" for key, value in inputs.items())
    return "\n".join(
        [
            f"training_pipeline failed in {stage or 'a stage that Flyte does not name'}, given {given}:",
            *(f"  {line}" for line in without_trace(message).splitlines()),
            f"logs: kubectl -n {project}-{domain} logs -l execution-id={name} --all-containers --prefix --tail=-1",
            f"checkpoints: {settings.checkpoint_copies or settings.checkpoints}",
            f"go on from what is done: flytectl create execution -p {project} -d {domain} --recover {name}",
        ]
    )


def without_trace(message: str) -> str:
    """What went wrong, of an error's message as flytekit writes it, which begins with a stack trace."""
    _, _, said = message.rpartition("\nMessage:\n")
    return textwrap.dedent(said.strip("\n")).strip().removeprefix("ForgeError: ")


def describe_here(inputs: dict[str, str], settings: Settings) -> str:
    """On this machine, where the error itself is shown after this: what a run with the same inputs goes on from."""
    if not settings.checkpoints.is_dir() or not any(settings.checkpoints.iterdir()):
        return ""
    given = " ".join(f"--{key} {value}" for key, value in inputs.items() if value)
    return f"The same command ({given}) goes on from the checkpoints in {settings.checkpoints}"
