"""vLLM answers as transformers does, and leaves no process running, whatever happens."""

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from forge.core.errors import ForgeError
from forge.core.recipe import Check, EvaluationRecipe
from forge.core.settings import Settings
from forge.models.chat import ChatTokenizer, load_tokenizer
from forge.registry.packages import LocalBase
from tasks.evaluate import answer, vllm_engine, vllm_worker
from tasks.evaluate.ask import Asked, ask, ask_all
from tasks.evaluate.items import Item, read_items
from tests.conftest import Trained

RECIPE = EvaluationRecipe(items=32, max_new_tokens=32, batch_size=20, samples=2)
REQUEST = {"model": "a-model", "items": [{}]}


@pytest.fixture
def model(trained: Trained) -> LocalBase:
    return LocalBase(str(trained.store.path(trained.model.uri) / "model"))


@pytest.fixture
def items(trained: Trained) -> list[Item]:
    return read_items(trained.store.path(trained.dataset.uri) / "heldout.jsonl", RECIPE.items, None)[0]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sessions that the test starts."""
    pids: list[int] = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            pids.append(self.pid)

    monkeypatch.setattr(vllm_engine.subprocess, "Popen", Popen)
    return pids


def alive(session: int) -> list[psutil.Process]:
    """The processes of a session that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_until_dead(session: int) -> None:
    """Killed processes take a moment to disappear."""
    deadline = time.monotonic() + 10
    while left := alive(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def long_item(model: LocalBase, tokens: int) -> Item:
    """A conversation with this number of tokens in total; the tokenizer's tokens are bytes."""
    chat = ChatTokenizer(load_tokenizer(model), "test")
    asked = ask(chat, Item([{"role": "user", "content": ""}], "{}", "", Check(kind="exact")))
    content = "x" * (tokens - len(asked.whole))
    return Item([{"role": "user", "content": content}], "{}", "", Check(kind="exact"))


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A script in place of vLLM's Python; each test writes its own."""
    program = tmp_path / "python"
    program.touch(mode=0o755)
    return program


def answer_with_vllm(model: LocalBase, asked: list[Asked], settings: Settings) -> list[answer.Answer]:
    """Answer items without a progress bar."""
    return vllm_engine.answer_with_vllm(model, asked, RECIPE, settings, lambda done: None)


@pytest.mark.long
def test_both_engines_answer_the_same(model: LocalBase, items: list[Item], started: list[int]) -> None:
    context = 128
    items = [*items, *(long_item(model, context + more) for more in (0, 1, 40))]
    progress: list[int] = []
    reference = answer.answer_with_transformers(model, ask_all(model, items), RECIPE, ["cpu"], lambda done: None)
    found = vllm_engine.answer_with_vllm(model, ask_all(model, items), RECIPE, Settings(), progress.append)
    assert progress[-1] == len(items)
    assert progress == sorted(progress)
    (session,) = started
    wait_until_dead(session)

    same = [mine.text == its.text for mine, its in zip(found, reference, strict=True)]
    assert sum(same) >= 0.9 * len(items)
    for mine, its, equal in zip(found, reference, same, strict=True):
        assert (mine.nll, mine.nll_tokens) == (pytest.approx(its.nll, rel=1e-3, nan_ok=True), its.nll_tokens)
        assert len(mine.samples) == 2
        if equal:
            assert (mine.ended, mine.tokens) == (its.ended, its.tokens)
    fills, over, far_over = found[-3:]
    assert fills.nll > 0
    assert fills.tokens > 0
    assert math.isnan(over.nll)
    assert over.tokens > 0
    assert (far_over.text, far_over.tokens, far_over.ended, far_over.samples) == ("", 0, False, ("", ""))
    assert math.isnan(far_over.nll)
    drawn = [text for one in found for text in one.samples]
    assert len(set(drawn)) > len({one.text for one in found}), "samples differ"


def test_a_broken_model_is_named(model: LocalBase, items: list[Item], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model.location, broken)
    (broken / "config.json").unlink()
    with pytest.raises(ForgeError, match=str(broken)):
        answer_with_vllm(LocalBase(str(broken)), ask_all(model, items), Settings())


def test_a_missing_python_is_named(model: LocalBase, items: list[Item], tmp_path: Path) -> None:
    settings = Settings(serving_python=tmp_path / "nowhere" / "python")
    with pytest.raises(ForgeError, match=r"nowhere/python: No such file.*make setup"):
        answer_with_vllm(model, ask_all(model, items), settings)


def test_the_error_ends_with_the_log(fake: Path) -> None:
    fake.write_text("#!/bin/sh\nseq 20\necho 'ValueError: out of memory' >&2\nexit 3\n")
    with pytest.raises(ForgeError, match=r"\(status 3\).*a-model:\n  10\n(.*\n)+  ValueError: out of memory$"):
        list(vllm_engine.run_worker(REQUEST, fake))


def test_an_interrupt_leaves_nothing_running(fake: Path, started: list[int]) -> None:
    fake.write_text(f"#!/bin/sh\nsleep 600 &\ntouch {fake}.up\nwait\n")

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not Path(f"{fake}.up").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # flytekit installs its own
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(vllm_engine.run_worker(REQUEST, fake))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert Path(f"{fake}.up").exists()
    (session,) = started
    wait_until_dead(session)


def test_closing_the_generator_leaves_nothing_running(fake: Path, started: list[int]) -> None:
    fake.write_text('#!/bin/sh\necho "{}" >> "$4"\nsleep 600 &\nwait\n')
    answers = vllm_engine.run_worker({**REQUEST, "items": [{}, {}]}, fake)
    assert next(answers) == [{}]
    answers.close()
    (session,) = started
    wait_until_dead(session)


def test_the_worker_exits_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    (tmp_path / "request.json").write_text("{}")
    worker = subprocess.Popen(
        [sys.executable, "-P", vllm_engine.WORKER, tmp_path / "request.json", tmp_path / "answers.jsonl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        start_new_session=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"up\n"
    worker.stdin.close()
    assert worker.wait(30) == -signal.SIGKILL
    worker.stdout.close()


class FakeLLM:
    """Answers every prompt with its length and an end-of-turn token, within a context of 8 tokens."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(
            max_model_len=8, get_diff_sampling_param=lambda: {"max_tokens": 99, "repetition_penalty": 1.1}
        )
        self.sampling: list[dict[str, Any]] = []

    def generate(self, prompts: list[dict], sampling: list[dict], use_tqdm: bool) -> list[SimpleNamespace]:
        self.sampling += sampling
        return [self.output(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, sampling, strict=True)]

    def output(self, tokens: list[int], sampling: dict[str, Any]) -> SimpleNamespace:
        """A token's log-probability is minus its value."""
        generated = SimpleNamespace(
            token_ids=[len(tokens), 0],
            finish_reason="stop" if sampling["max_tokens"] > 1 else "length",
            logprobs=[{token: SimpleNamespace(logprob=-token) for token in sampling.get("logprob_token_ids", [])}],
        )
        prompt = [{token: SimpleNamespace(logprob=-token)} for token in tokens]
        return SimpleNamespace(outputs=[generated] * sampling.get("n", 1), prompt_logprobs=prompt)


def test_the_worker_answers_within_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    model, request = FakeLLM(), {"max_new_tokens": 4, "samples": 2, "temperature": 0.5}
    fitting = {"prompt": [1, 2, 3], "whole": [1, 2, 3, 4, 5], "scored": [3, 4]}
    full = {"prompt": [1] * 7, "whole": [1] * 8, "scored": [7]}
    over = {"prompt": [1] * 8, "whole": [1] * 9, "scored": [8]}
    rejected: dict[str, list[int]] = {"prompt": [], "whole": [], "scored": []}
    answers = list(vllm_worker.answer(model, request, list(enumerate([fitting, full, over, rejected]))))
    assert [one["at"] for one in answers] == [0, 1, 2, 3]
    assert [one["tokens"] for one in answers] == [[3, 0], [7, 0], [], []]
    assert [one["ended"] for one in answers] == [True, False, False, False]
    assert [one["samples"] for one in answers] == [[[3, 0]] * 2, [[7, 0]] * 2, [[], []], [[], []]]
    assert [one["nll"] for one in answers[:2]] == [9, 1]
    assert all(math.isnan(one["nll"]) for one in answers[2:])
    greedy, _, drawn, *_ = model.sampling
    assert (greedy["max_tokens"], greedy["temperature"], greedy["repetition_penalty"]) == (4, 0.0, 1.1)
    assert (drawn["max_tokens"], drawn["temperature"], drawn["n"]) == (4, 0.5, 2)
