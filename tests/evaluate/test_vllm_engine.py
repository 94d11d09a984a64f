"""vLLM answers as transformers does, and nothing of it is left running, whatever happens."""

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from forge.core.errors import ForgeError
from forge.core.recipe import Check, EvaluationRecipe
from forge.core.settings import Settings
from forge.registry.packages import LocalBase
from tasks.evaluate import answer, vllm_engine
from tasks.evaluate.ask import ask, ask_all, load_tokenizer
from tasks.evaluate.items import Item, read_items
from tests.conftest import Trained

RECIPE = EvaluationRecipe(items=32, max_new_tokens=32, batch_size=20, samples=2)
REQUEST = {"model": "a-model", "items": [{}]}


@pytest.fixture
def of(trained: Trained) -> LocalBase:
    return LocalBase(str(trained.store.path(trained.model.uri) / "model"))


@pytest.fixture
def items(trained: Trained) -> list[Item]:
    return read_items(trained.store.path(trained.dataset.uri) / "heldout.jsonl", RECIPE.items, None)[0]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sessions that were started."""
    pids: list[int] = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            pids.append(self.pid)

    monkeypatch.setattr(vllm_engine.subprocess, "Popen", Popen)
    return pids


def living(session: int) -> list[psutil.Process]:
    """The processes of a session that live."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_until_dead(session: int) -> None:
    """Killed processes take a moment to go."""
    deadline = time.monotonic() + 10
    while left := living(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def long_item(of: LocalBase, tokens: int) -> Item:
    """A conversation of so many tokens in all; the tokenizer's are bytes."""
    tokenizer = load_tokenizer(of)
    asked = ask(tokenizer, Item([{"role": "user", "content": ""}], "{}", "", Check(kind="exact")))
    content = "x" * (tokens - len(asked.whole))
    return Item([{"role": "user", "content": content}], "{}", "", Check(kind="exact"))


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """Stands where vLLM's Python would; what it does is written into it."""
    program = tmp_path / "python"
    program.touch(mode=0o755)
    return program


@pytest.mark.long
def test_both_engines_answer_alike(of: LocalBase, items: list[Item], started: list[int]) -> None:
    room = 128
    items = [*items, long_item(of, room), long_item(of, room + 1), long_item(of, room + 40)]
    heard: list[int] = []
    usual = answer.answer_with_transformers(of, ask_all(of, items), RECIPE, ["cpu"], lambda done: None)
    found = vllm_engine.answer_with_vllm(of, ask_all(of, items), RECIPE, Settings(), heard.append)
    assert heard[-1] == len(items)
    assert heard == sorted(heard)
    (session,) = started
    wait_until_dead(session)

    same = [mine.text == its.text for mine, its in zip(found, usual, strict=True)]
    assert sum(same) >= 0.9 * len(items)
    for mine, its, equal in zip(found, usual, same, strict=True):
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
    assert len(set(drawn)) > len({one.text for one in found}), "samples are drawn"


def test_a_broken_model_is_named(of: LocalBase, items: list[Item], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(of.location, broken)
    (broken / "config.json").unlink()
    with pytest.raises(ForgeError, match=str(broken)):
        vllm_engine.answer_with_vllm(LocalBase(str(broken)), ask_all(of, items), RECIPE, Settings(), lambda done: None)


def test_a_python_that_is_not_there_is_named(of: LocalBase, items: list[Item], tmp_path: Path) -> None:
    settings = Settings(serving_python=tmp_path / "nowhere" / "python")
    with pytest.raises(ForgeError, match=r"nowhere/python: No such file.*make setup"):
        vllm_engine.answer_with_vllm(of, ask_all(of, items), RECIPE, settings, lambda done: None)


def test_the_end_of_the_log_says_why_vllm_ended(fake: Path) -> None:
    fake.write_text("#!/bin/sh\nseq 20\necho 'ValueError: no room' >&2\nexit 3\n")
    with pytest.raises(ForgeError, match=r"\(status 3\).*a-model:\n  12\n(.*\n)+  ValueError: no room$"):
        list(vllm_engine.run_worker(REQUEST, fake))


def test_an_interrupt_leaves_nothing_running(fake: Path, started: list[int]) -> None:
    fake.write_text(f"#!/bin/sh\nsleep 600 &\ntouch {fake}.up\nwait\n")

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not Path(f"{fake}.up").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # flytekit, once imported, has one of its own
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(vllm_engine.run_worker(REQUEST, fake))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert Path(f"{fake}.up").exists()
    (session,) = started
    wait_until_dead(session)


def test_an_error_of_who_asks_leaves_nothing_running(fake: Path, started: list[int]) -> None:
    fake.write_text('#!/bin/sh\necho "{}" >> "$4"\nsleep 600 &\nwait\n')
    answers = vllm_engine.run_worker({**REQUEST, "items": [{}, {}]}, fake)
    assert next(answers) == [{}]
    answers.close()
    (session,) = started
    wait_until_dead(session)


def test_the_worker_ends_with_who_asks(tmp_path: Path) -> None:
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
