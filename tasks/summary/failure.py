"""The messages of a failed pipeline."""

import os
import textwrap

from forge.core.settings import Settings


def failure_message(stage: str, message: str, inputs: dict[str, str], settings: Settings) -> str:
    """On a cluster: the failed stage, its error, the inputs, the logs, and how to resume."""
    project, domain, name = (
        os.environ.get(f"FLYTE_INTERNAL_EXECUTION_{part}", "") for part in ("PROJECT", "DOMAIN", "ID")
    )
    given = ", ".join(f"{key} {value!r}" if "\n" not in value else f"{key} as YAML" for key, value in inputs.items())
    return "\n".join(
        [
            f"training_pipeline failed in {stage or 'an unknown stage'}, with {given}:",
            *(f"  {line}" for line in without_trace(message).splitlines()),
            f"logs: kubectl -n {project}-{domain} logs -l execution-id={name} --all-containers --prefix --tail=-1",
            f"checkpoints: {settings.checkpoint_copies or settings.checkpoints}",
            f"resume from the completed stages: flytectl create execution -p {project} -d {domain} --recover {name}",
        ]
    )


def without_trace(message: str) -> str:
    """The message of an error as flytekit formats it, without the stack trace before it."""
    _, _, text = message.rpartition("\nMessage:\n")
    return textwrap.dedent(text.strip("\n")).strip().removeprefix("ForgeError: ")


def resume_hint(inputs: dict[str, str], settings: Settings) -> str:
    """On this machine, where the error itself is shown: the checkpoints that the same command resumes from, or ""."""
    if not settings.checkpoints.is_dir() or not any(one.is_dir() for one in settings.checkpoints.iterdir()):
        return ""
    given = " ".join(f"--{key} {value}" for key, value in inputs.items() if value)
    return f"The same command ({given}) resumes from the checkpoints in {settings.checkpoints}"
