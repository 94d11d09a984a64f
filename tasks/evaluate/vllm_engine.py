"""The same questions as `answer`'s, answered by vLLM: the engine that serves, in an environment of its own."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from forge.core.errors import ForgeError
from forge.core.recipe import EvaluationRecipe
from forge.core.settings import Settings
from forge.registry.packages import LocalBase
from forge.serving.vllm_environment import saved_dtype, vllm_environment
from tasks.evaluate.answer import SEED, Answer, Tell, batches
from tasks.evaluate.ask import Asked, load_tokenizer

WORKER = Path(__file__).with_name("vllm_worker.py")
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # but for one a GPU, where there are several
ENDING = 30.0  # seconds that vLLM has to end by itself when all is answered
LOOK = 0.1  # seconds between looks at what was answered


def answer_with_vllm(
    of: LocalBase, asked: Sequence[Asked], recipe: EvaluationRecipe, settings: Settings, tell: Tell
) -> list[Answer]:
    """Answer every item with a model in Hugging Face format, in its own dtype; `tell` hears how many are done.

    Tokens are made and read here, so that they are those of the other engine. All GPUs share one model. `seconds` of
    an answer are those of its batch.

    Raises ForgeError, with the end of vLLM's log, where vLLM ends without having answered.
    """
    tokenizer = load_tokenizer(of)
    directory = local_directory(of)
    request = {
        "model": str(directory),
        **model_facts(directory),
        "seed": SEED,
        "max_new_tokens": recipe.max_new_tokens,
        "samples": recipe.samples,
        "temperature": recipe.temperature,
        "items": [{"prompt": one.prompt, "whole": one.whole, "scored": one.scored} for one in asked],
        "batches": list(batches([len(one.prompt) for one in asked], recipe.batch_size)),
    }

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    answers: dict[int, Answer] = {}
    with contextlib.closing(run_worker(request, settings.serving_python)) as batches_answered:
        for batch in batches_answered:
            for one in batch:
                answers[one["at"]] = Answer(
                    text=text(one["tokens"]),
                    tokens=len(one["tokens"]),
                    ended=one["ended"],
                    seconds=one["seconds"],
                    nll=one["nll"],
                    nll_tokens=len(asked[one["at"]].scored),
                    samples=tuple(text(tokens) for tokens in one["samples"]),
                )
            tell(len(answers))
    return [answers[at] for at in range(len(asked))]


def run_worker(request: dict[str, Any], python: Path) -> Generator[list[dict[str, Any]], None, None]:
    """Give a request to a worker, and its answers as they come; none of its processes is left at the end.

    The worker leads a session, whose processes are killed. Its standard input ends with this process, and with the
    `Popen` of a worker that was interrupted while it started: then it ends by itself.
    """
    with tempfile.TemporaryDirectory(prefix="forge-vllm-", ignore_cleanup_errors=True) as folder:
        asked, answers, log = (Path(folder) / name for name in ("request.json", "answers.jsonl", "vllm.log"))
        asked.write_text(json.dumps(request))
        answers.touch()
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
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
                f"evaluation: vLLM cannot be started to answer with {request['model']}: {python}: {error.strerror}; "
                "see FORGE_SERVING_PYTHON, or run make setup"
            ) from None
        with process:
            try:
                done = 0
                for found in follow(process, answers):
                    done += len(found)
                    yield found
                    if done == len(request["items"]):
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(ENDING)
                        return
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        raise ForgeError(
            f"evaluation: vLLM ended (status {process.returncode}) before it had answered with {request['model']}:\n"
            + last_lines(log)
        )


def follow(process: subprocess.Popen[bytes], answers: Path) -> Iterator[list[dict[str, Any]]]:
    """The lines that a process adds to a file, as it adds them, until it ends."""
    with answers.open() as lines:
        rest = ""
        ended = False
        while not ended:
            ended = process.poll() is not None  # before the look, which then misses nothing
            *complete, rest = (rest + lines.read()).split("\n")
            if complete:
                yield [json.loads(line) for line in complete]
            elif not ended:
                time.sleep(LOOK)


def local_directory(of: LocalBase) -> Path:
    """Where a model's files are on this machine; downloads them from the hub if they are not."""
    if Path(of.location).is_dir():
        return Path(of.location)
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
    try:
        return Path(snapshot_download(of.location, revision=of.revision or None, allow_patterns=kinds))
    except (OSError, ValueError) as error:
        raise ForgeError(f"evaluation: {of.location} cannot be loaded: {str(error).splitlines()[0]}") from None


def model_facts(directory: Path) -> dict[str, Any]:
    """A model's `dtype`, and the number of its attention `heads`, which its GPUs share evenly."""
    try:
        config = json.loads((directory / "config.json").read_text())
        dtype = saved_dtype(directory)
    except (OSError, ValueError) as error:
        raise ForgeError(f"evaluation: {directory} cannot be loaded: {error}") from None
    return {"dtype": dtype, "heads": int((config | config.get("text_config", {})).get("num_attention_heads", 1))}


def last_lines(log: Path, count: int = 10) -> str:
    """The end of a log, indented."""
    return "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-count:])
