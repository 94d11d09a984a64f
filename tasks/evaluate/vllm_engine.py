"""Answers to items with vLLM, the engine that serves. It runs in its own Python environment."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from forge.core.errors import ForgeError
from forge.core.full_disk import temporary_directory
from forge.core.processes import last_lines
from forge.core.recipe import EvaluationRecipe
from forge.core.settings import Settings
from forge.models.chat import load_tokenizer
from forge.models.hub import local_directory
from forge.registry.packages import LocalBase
from forge.serving.vllm_environment import saved_dtype, vllm_environment
from tasks.evaluate.answer import SEED, Answer, OnProgress, batches, cannot_load
from tasks.evaluate.ask import Asked

WORKER = Path(__file__).with_name("vllm_worker.py")
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # with several GPUs, vLLM still starts one process per GPU
EXIT_SECONDS = 30.0  # for vLLM to exit after the last answer
POLL_SECONDS = 0.1  # between reads of the answers


def answer_with_vllm(
    model: LocalBase, asked: Sequence[Asked], recipe: EvaluationRecipe, settings: Settings, on_progress: OnProgress
) -> list[Answer]:
    """Answer every item with a model in Hugging Face format, in the dtype it was saved in, on all GPUs together.

    Prompts are tokenized and answers decoded in this process, as with the other engine.

    Raises ForgeError with the end of vLLM's log if vLLM exits before it has answered everything.
    """
    tokenizer = load_tokenizer(model)

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    answers: dict[int, Answer] = {}
    request = worker_request(local_directory(model), asked, recipe)
    with contextlib.closing(run_worker(request, settings.serving_python)) as answered:
        for lines in answered:
            answers |= {line["at"]: read_answer(line, len(asked[line["at"]].scored), text) for line in lines}
            on_progress(len(answers))
    return [answers[at] for at in range(len(asked))]


def worker_request(directory: Path, asked: Sequence[Asked], recipe: EvaluationRecipe) -> dict[str, Any]:
    """The worker's input: the model, how to generate, and the items with their batches."""
    return {
        "model": str(directory),
        **model_facts(directory),
        "seed": SEED,
        "max_new_tokens": recipe.max_new_tokens,
        "samples": recipe.samples,
        "temperature": recipe.temperature,
        "items": [{"prompt": one.prompt, "whole": one.whole, "scored": one.scored} for one in asked],
        "batches": list(batches([len(one.prompt) for one in asked], recipe.batch_size)),
    }


def read_answer(line: dict[str, Any], nll_tokens: int, text: Callable[[list[int]], str]) -> Answer:
    """An answer from a line of the worker's output."""
    return Answer(
        text=text(line["tokens"]),
        tokens=len(line["tokens"]),
        ended=line["ended"],
        seconds=line["seconds"],
        nll=line["nll"],
        nll_tokens=nll_tokens,
        samples=tuple(text(tokens) for tokens in line["samples"]),
    )


def run_worker(request: dict[str, Any], python: Path) -> Generator[list[dict[str, Any]], None, None]:
    """Run a worker on a request and yield its answers as they arrive. No process of it survives the generator.

    The worker leads a session, and all processes of the session are killed at the end. The worker also kills them
    itself when its standard input closes: when this process dies, or is interrupted while Popen starts the worker.
    """
    with temporary_directory("forge-vllm-", "the files of vLLM's evaluation") as folder:
        answers, log = folder / "answers.jsonl", folder / "vllm.log"
        with _start_worker(request, python, folder, answers, log) as process:
            try:
                done = 0
                for lines in follow(process, answers):
                    done += len(lines)
                    yield lines
                    if done == len(request["items"]):
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(EXIT_SECONDS)
                        return
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        raise ForgeError(
            f"vLLM exited (status {process.returncode}) before it had answered with {request['model']}:\n"
            + last_lines(log),
            where="evaluation",
        )


def _start_worker(
    request: dict[str, Any], python: Path, folder: Path, answers: Path, log: Path
) -> subprocess.Popen[bytes]:
    asked = folder / "request.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    answers.touch()
    try:
        with log.open("wb") as output:
            return subprocess.Popen(
                [python, "-P", WORKER, asked, answers],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=vllm_environment(**ONE_PROCESS),
                cwd=folder,
                start_new_session=True,
            )
    except OSError as error:
        raise ForgeError(
            f"vLLM cannot be started to answer with {request['model']}: {python}: {error.strerror}",
            where="evaluation",
            fix="check FORGE_SERVING_PYTHON, or run make setup",
        ) from None


def follow(process: subprocess.Popen[bytes], answers: Path) -> Iterator[list[dict[str, Any]]]:
    """The lines that a process appends to a file, as they arrive, until it exits."""
    with answers.open(encoding="utf-8") as lines:
        rest = ""
        exited = False
        while not exited:
            exited = process.poll() is not None  # before reading, so that no line is missed
            *complete, rest = (rest + lines.read()).split("\n")
            if complete:
                yield [json.loads(line) for line in complete]
            elif not exited:
                time.sleep(POLL_SECONDS)


def model_facts(directory: Path) -> dict[str, Any]:
    """A model's `dtype`, and its number of attention `heads`, which tensor parallelism must divide."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        dtype = saved_dtype(directory)
    except (OSError, ValueError) as error:
        raise cannot_load(directory, error) from None
    return {"dtype": dtype, "heads": int((config | config.get("text_config", {})).get("num_attention_heads", 1))}
