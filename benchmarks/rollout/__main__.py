"""`python -m benchmarks.rollout`: swap adapters on vLLM under load.

The last line on stdout is one JSON object. See docs/benchmarks.md.
"""

import argparse
import json
import socket
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import urllib3

from benchmarks.measure import say
from benchmarks.rollout.names import cost
from forge.core.contracts import Engine
from forge.core.settings import Settings
from forge.serving.client import client_of
from forge.serving.desired import Desired, Served, Serving
from forge.serving.local_target import LocalTarget
from forge.serving.vllm_process import LocalServer
from forge.storage import DirectoryStore
from tests.serving.models import publish, write_adapter, write_base

HIDDEN, LAYERS, RANK = 512, 4, 64  # an adapter of about 10 MB in fp32
NAME, CLIENTS, TOKENS = "bench", 8, 48
PROMPTS = ["What is the day?", "Hello", "Tell me more", "20 juni 1969"]


def main() -> None:
    """Serve a base and the first adapter, then swap adapters."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout")
    parser.add_argument("--swaps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forge-benchmark-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings = Settings(home=Path(folder) / "home", serving_port=probe.getsockname()[1])
        probe.close()
        target = LocalTarget(settings)
        try:
            print(json.dumps(measure(target, *packages(settings, Path(folder)), options.swaps)))
        finally:
            target.stop()
            LocalServer(settings).stop()


def packages(settings: Settings, folder: Path) -> tuple[Served, list[Served]]:
    """A base, and the adapters that are swapped in turn."""
    store = DirectoryStore(settings.store_root)
    directory = write_base(folder / "base", HIDDEN, LAYERS)
    base = publish(store, directory, NAME, 1)
    adapters = [
        publish(store, write_adapter(folder / f"adapter-{seed}", directory, RANK, seed), NAME, seed, base)
        for seed in range(2, 6)
    ]
    return base, adapters


@dataclass
class Answers:
    """The clients' answers: latency in seconds, version, prompt, text, and the time at the end."""

    received: list[tuple[float, str, str, str, float]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def measure(target: LocalTarget, base: Served, adapters: list[Served], swaps: int, quiet: float = 20) -> dict[str, Any]:
    """Swap adapters under load, after `quiet` seconds of load without swaps.

    Each answer is compared with the one that its version gives without load.
    """
    engine = Engine(max_loras=2, max_lora_rank=RANK)
    declare(target, Serving(base=base, engine=engine, adapters=(adapters[0],), names={NAME: adapters[0].versioned}))
    say("vLLM is ready; recording the answers of each version")
    unloaded: dict[tuple[str, str], str] = {}
    for adapter in adapters:
        declare(target, Serving(base=base, engine=engine, adapters=(adapter,), names={NAME: adapter.versioned}))
        for prompt in PROMPTS:
            version, text = ask(target.endpoint, prompt)
            unloaded[version, prompt] = text
    answers, ended = Answers(), threading.Event()
    clients = [threading.Thread(target=keep_asking, args=(target.endpoint, answers, ended, n)) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(quiet)
    before = [seconds for seconds, *_ in answers.received]
    swapped, periods = [], []
    loads, loading = adapter_loads(target)
    for number in range(swaps):
        adapter = adapters[number % len(adapters)]
        started = time.monotonic()
        swapped.append(
            declare(target, Serving(base=base, engine=engine, adapters=(adapter,), names={NAME: adapter.versioned}))
        )
        time.sleep(1)
        periods.append((started, time.monotonic()))
    loads, loading = (after - before for after, before in zip(adapter_loads(target), (loads, loading), strict=True))
    ended.set()
    for client in clients:
        client.join()
    during = [
        seconds
        for seconds, *_, at in answers.received
        if any(at - seconds < end and at > start for start, end in periods)
    ]
    wrong = [answer for answer in answers.received if unloaded[answer[1], answer[2]] != answer[3]]
    for error in answers.failed[:3]:
        say(f"failed: {error}")
    for _, version, prompt, text, _ in wrong[:3]:
        say(f"{version} answered {prompt!r} with {text!r} under load, and {unloaded[version, prompt]!r} without")
    return {
        "swaps": swaps,
        "requests": len(answers.received) + len(answers.failed),
        "failed_requests": len(answers.failed),
        "wrong_version_answers": len(wrong),
        "versions_that_answered": len({version for _, version, *_ in answers.received}),
        "swap_seconds_median": round(statistics.median(swapped), 3),
        "vllm_load_seconds_mean": round(loading / loads, 3),
        "swap_seconds_max": round(max(swapped), 3),
        "p99_latency_during_swap_ratio": round(percentile(during, 99) / percentile(before, 99), 2),
        "p50_latency_during_swap_ratio": round(percentile(during, 50) / percentile(before, 50), 2),
        "middleware_ms": round(cost(), 4),
    }


def declare(target: LocalTarget, serving: Serving) -> float:
    """Change the desired state; returns the seconds until the public name points to it."""
    desired, revision = target.document.read()
    started = time.monotonic()
    target.document.write(Desired(generation=desired.generation + 1, serving=serving), revision)
    while True:
        actual = target.status()
        if actual is None:
            target.ensure()
        elif actual.failed:
            raise RuntimeError(actual.waiting)
        elif actual.generation > desired.generation and actual.names == serving.names:
            return time.monotonic() - started
        time.sleep(0.005)


def adapter_loads(target: LocalTarget) -> tuple[float, float]:
    """The number of adapters that vLLM has loaded and the seconds that took, from the reconciler's metrics."""
    port = json.loads(target.record.read_text())["port"]
    text = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics").data.decode()
    values = dict(line.split(" ") for line in text.splitlines() if line.startswith("forge_adapter_load"))
    return float(values["forge_adapter_loads_total"]), float(values["forge_adapter_load_seconds_total"])


def ask(endpoint: str, prompt: str) -> tuple[str, str]:
    """The version that answers under the public name, and its greedy answer."""
    messages: Any = [{"role": "user", "content": prompt}]
    answer = client_of(endpoint).chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=TOKENS, extra_body={"ignore_eos": True}
    )
    return answer.model, answer.choices[0].message.content or ""


def keep_asking(endpoint: str, answers: Answers, ended: threading.Event, number: int) -> None:
    """A client that sends one request after another."""
    while not ended.is_set():
        prompt = PROMPTS[number % len(PROMPTS)]
        number += 1
        started = time.monotonic()
        try:
            version, text = ask(endpoint, prompt)
        except Exception as error:  # any error is a failed request
            answers.failed.append(f"{type(error).__name__}: {error}")
            continue
        now = time.monotonic()
        answers.received.append((now - started, version, prompt, text, now))


def percentile(values: list[float], percent: int) -> float:
    """A percentile of the values."""
    return statistics.quantiles(values, n=100)[percent - 1]


if __name__ == "__main__":
    main()
