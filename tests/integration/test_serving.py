"""Swaps on a real vLLM: under load, with requests in flight, watched, refused, and by hand."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from safetensors.torch import save_file

from benchmarks.rollout.__main__ import declare, measure, packages
from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.registry.mlflow_registry import open_registry
from forge.registry.packages import open_package
from forge.serving.desired import Desired, Served
from forge.serving.local_target import LocalTarget
from forge.serving.vllm_client import VLLM
from forge.serving.vllm_process import LocalServer
from tasks.rollout.rollout import Candidate, serve
from tests.integration.harness import PROJECT
from tests.integration.registered import Server
from tests.serving.models import publish, write_adapter

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serving"))
    try:
        yield server
    finally:
        server.stop()


def swapped(server: Server, to: str) -> str:
    """Serve a version; returns what was printed."""
    rollout = server.swap(to, watch=0)
    output, _ = rollout.communicate(timeout=300)
    assert rollout.returncode == 0, output
    server.settle()
    server.agrees()
    return output


def test_a_request_in_flight_ends_with_its_version_which_is_unloaded_only_then(server: Server) -> None:
    swapped(server, "2")
    before = server.target.document.read()[0].serving
    old, new = server.versions["2"], server.versions["3"]
    client = OpenAI(base_url=server.settings.endpoint, api_key="EMPTY", max_retries=0)
    streams = [  # so many that they take some seconds
        client.chat.completions.create(
            model="dates", messages=[{"role": "user", "content": "Hello"}], max_tokens=480, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in range(16)
    ]  # fmt: skip
    said = {next(iter(stream)).model for stream in streams}
    declare(server.target, before.model_copy(update={"adapters": (new,), "names": {"dates": new.versioned}}))
    actual = server.target.status()
    assert actual is not None
    assert actual.in_flight[old.versioned] > 0
    assert set(actual.loaded) == {old.versioned, new.versioned}
    for stream in streams:
        chunks = list(stream)
        said |= {chunk.model for chunk in chunks}
        assert chunks[-1].choices[0].finish_reason == "length"
    assert said == {old.versioned}
    deadline = time.monotonic() + 60
    while old.versioned in VLLM(server.target.endpoint.removesuffix("/v1")).models():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    declare(server.target, before)


def test_public_names_are_listed_and_the_base_answers_by_its_own(server: Server) -> None:
    swapped(server, "2")
    client = OpenAI(base_url=server.settings.endpoint, api_key="EMPTY", max_retries=0)
    listed = {model.id for model in client.models.list()}
    assert listed == {"dates", server.versions["1"].versioned, server.versions["2"].versioned}


def test_how_likely_prompts_are_can_be_asked_of_an_adapter_several_at_once(server: Server) -> None:
    """vLLM's engine ends there, on a CPU, where its output layer takes adapters: see forge/serving/engine.py."""
    swapped(server, "2")
    version, vllm = server.versions["2"].versioned, VLLM(server.target.endpoint.removesuffix("/v1"))
    prompts = [vllm.tokens(version, [{"role": "user", "content": "Hello" * n}], None) for n in (1, 2, 3)]
    alone = [vllm.prompt_nll(version, prompt, list(range(1, len(prompt)))) for prompt in prompts]
    client = OpenAI(base_url=server.settings.endpoint, api_key="EMPTY", max_retries=0)
    together = client.completions.create(
        model=version, prompt=prompts, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    for prompt, choice, nll in zip(prompts, together.choices, alone, strict=True):
        found = [
            float(one[str(token)]["logprob"]) for one, token in zip(choice.prompt_logprobs[1:], prompt[1:], strict=True)
        ]
        assert -sum(found) / len(found) == pytest.approx(nll, abs=1e-4)


def test_to_the_base_under_its_adapter_only_the_name_moves(server: Server) -> None:
    swapped(server, "2")
    running = LocalServer(server.settings).running()
    output = swapped(server, "1")
    assert "dates version 1 serves in place of version 2" in output
    assert LocalServer(server.settings).running() == running


def test_a_version_that_stops_answering_while_it_is_watched_is_rolled_back(server: Server) -> None:
    swapped(server, "2")
    rollout = server.swap("3", watch=120)
    while server.target.document.read()[0].serving.names["dates"] != server.versions["3"].versioned:
        assert rollout.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    running = LocalServer(server.settings).running()
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    output, _ = rollout.communicate(timeout=300)
    assert rollout.returncode != 0
    text = " ".join(output.split())
    assert f"{server.versions['3'].versioned}: did not answer during the watch period" in text
    assert "serves again; the champion is unchanged" in text
    server.settle()
    server.agrees()
    assert server.champion() == "2"
    tags = open_registry(server.settings).get_model_version("dates", "3").tags
    assert "did not answer" in tags["rollout_failed"]
    swapped(server, "3")
    assert "rollout_failed" not in open_registry(server.settings).get_model_version("dates", "3").tags


def test_where_vllms_engine_dies_nothing_is_said_to_serve_until_it_does_again(server: Server) -> None:
    swapped(server, "2")
    running = LocalServer(server.settings).running()
    assert running is not None
    (engine,) = [one for one in running.processes() if "EngineCore" in " ".join(one.cmdline())]
    engine.kill()
    said: list[str] = []
    while (now := LocalServer(server.settings).running()) is None or now.pid == running.pid:
        actual = server.target.status()
        said += [actual.waiting] if actual and actual.waiting not in said[-1:] else []
        time.sleep(0.02)
    assert "" not in said[1:], "it served, for all that was said"
    server.settle()
    server.agrees()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rollout_that_is_interrupted_is_undone(server: Server, number: int) -> None:
    swapped(server, "2")
    rollout = server.swap("3", watch=120)
    while server.target.document.read()[0].serving.names["dates"] != server.versions["3"].versioned:
        assert rollout.poll() is None
        time.sleep(0.05)
    os.killpg(rollout.pid, number)
    rollout.communicate(timeout=60)
    assert rollout.returncode != 0
    server.settle()
    server.agrees()
    assert server.champion() == "2"
    assert "interrupted" in open_registry(server.settings).get_model_version("dates", "3").tags["rollout_failed"]


def test_an_adapter_of_too_high_a_rank_is_refused_before_anything_is_touched(server: Server, tmp_path: Path) -> None:
    swapped(server, "2")
    base = server.versions["1"]
    package = open_package(base.uri, base.digest, server.settings, server.store)[0]
    wide = publish(server.store, write_adapter(tmp_path / "wide", package, rank=32, seed=9), "dates", 9, base)
    directory, manifest = open_package(wide.uri, wide.digest, server.settings, server.store)
    candidate = Candidate(wide, directory, {**manifest, "rank": 32}, None, "2", "a test")
    with pytest.raises(ForgeError, match=r"adapter of rank 32: the base is served with serving\.max_lora_rank 16"):
        serve(candidate, ServingRecipe(), server.settings, server.store)
    assert server.target.document.read()[0].serving.adapters == (server.versions["2"],)
    server.agrees()


def test_an_adapter_that_vllm_cannot_load_is_told_and_undone(server: Server) -> None:
    swapped(server, "2")
    with server.store.stage() as staged:
        (staged / "adapter_config.json").write_text("{}")
        uri = server.store.publish(staged, "models/dates", facts={"name": "dates", "kind": "adapter"})
    broken = Served(name="dates", version="3", uri=uri, digest=uri.rpartition("sha256-")[2])
    base = server.versions["1"]
    manifest = {"kind": "adapter", "base": {"location": base.uri, "revision": base.digest}, "rank": 8}
    candidate = Candidate(broken, server.store.path(uri), manifest, None, "2", "a test")
    with pytest.raises(ForgeError, match=r"cannot be served: vLLM does not load the adapter"):
        serve(candidate, ServingRecipe(), server.settings, server.store)
    server.settle()
    server.agrees()


def test_weights_that_vllm_cannot_load_are_told_and_undone(server: Server) -> None:
    swapped(server, "2")
    first = server.versions["1"]
    with server.store.stage() as staged:
        for path in open_package(first.uri, first.digest, server.settings, server.store)[0].iterdir():
            if path.name != "manifest.json":
                (staged / path.name).write_bytes(path.read_bytes())
        save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, staged / "model.safetensors")
        uri = server.store.publish(staged, "models/dates", facts={"name": "dates", "kind": "model"})
    broken = Served(name="dates", version="3", uri=uri, digest=uri.rpartition("sha256-")[2])
    candidate = Candidate(broken, server.store.path(uri), {"kind": "model"}, None, "2", "a test")
    with pytest.raises(ForgeError, match="vLLM exited during startup") as caught:
        serve(candidate, ServingRecipe(), server.settings, server.store)
    assert "serves again; the champion is unchanged" in caught.value.message
    server.settle()
    server.agrees()
    assert server.champion() == "2"


def run_forge(server: Server, *command: str) -> subprocess.CompletedProcess:
    """Run `forge ...` in the server's home."""
    environment = os.environ | {
        "FORGE_HOME": str(server.settings.home),
        "FORGE_SERVING_PORT": str(server.settings.serving_port),
    }
    program = Path(sys.executable).with_name("forge")
    return subprocess.run([program, *command], cwd=PROJECT, env=environment, capture_output=True, text=True)


def test_status_stop_start_ask_and_remove(server: Server) -> None:
    swapped(server, "2")
    assert run_forge(server, "ask", "Hello").returncode == 0
    assert "no, all is as desired" in run_forge(server, "status").stdout
    assert run_forge(server, "stop").stdout == "Stopped dates.\n"
    assert LocalServer(server.settings).running() is None
    assert server.target.status() is None
    assert run_forge(server, "stop").stdout == "Nothing is serving.\n"
    assert "Starting dates" in run_forge(server, "start").stdout
    server.settle()
    server.agrees()
    assert "times is not served; served now: dates" in run_forge(server, "remove", "times").stderr
    assert run_forge(server, "remove", "dates").stdout == "dates is no longer served.\n"
    deadline = time.monotonic() + 60
    while LocalServer(server.settings).running() is not None or LocalTarget(server.settings).status() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "nothing is serving" in run_forge(server, "ask", "Hello").stderr


def test_20_swaps_while_8_clients_keep_asking(server: Server) -> None:
    base, adapters = packages(server.settings, server.settings.home / "bench")
    found = measure(server.target, base, adapters, 20, quiet=5)
    assert found["failed_requests"] == 0
    assert found["wrong_version_answers"] == 0
    assert found["versions_that_answered"] == len(adapters)
    there, revision = server.target.document.read()
    server.target.document.write(Desired(generation=there.generation + 1), revision)  # nothing, for the next test
