"""Telemetry records a training run, and is never in its way."""

import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prometheus_client.parser import text_string_to_metric_families
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from tasks.finetune import gpu_monitor, telemetry
from tasks.finetune.flops import flops_per_token, peak_flops
from tasks.finetune.gpu_monitor import CoolDown, gpu_temperature, read_gpu
from tasks.finetune.telemetry import EXPERIMENT, TRAINING, Telemetry

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The embedded MLflow, in a home of the test's own."""
    return Settings(home=tmp_path / "home")


def watch(settings: Settings, training: str = "one", params: dict[str, object] | None = None) -> Telemetry:
    """The telemetry of a training on the CPU: 2 operations a token, of 1,000 a second."""
    return Telemetry(
        settings,
        "dates",
        {"global_batch_size": 8} if params is None else params,
        training=training,
        steps=10,
        device=CPU,
        flops_per_token=2.0,
        peak_flops=1000.0,
    )


def runs(settings: Settings) -> list[Any]:
    """The training runs in MLflow."""
    client = open_registry(settings)
    return list(client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id]))


def history(settings: Settings, run: Any, key: str) -> list[tuple[int, float]]:
    """Steps and values of a run's metric."""
    found = open_registry(settings).get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> dict[str, float]:
    """What the endpoint says, by sample."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_a_run_is_in_mlflow(settings: Settings) -> None:
    with watch(settings) as watched:
        for step in (1, 2, 3):
            watched.log(step, {"loss": 4 - step, "learning_rate": 0.1, "tokens_per_second": 100.0 * step})
        watched.log(3, {"heldout_loss": 2.5})
    (run,) = runs(settings)
    assert (run.info.run_name, run.info.status, run.data.tags[TRAINING]) == ("dates", "FINISHED", "one")
    assert run.data.params == {"global_batch_size": "8"}
    assert history(settings, run, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert history(settings, run, "heldout_loss") == [(3, 2.5)]
    assert history(settings, run, "mfu") == [(1, 0.2), (2, 0.4), (3, pytest.approx(0.6))]
    assert watched.tracking.dropped == 0


def test_more_values_than_a_call_takes_all_arrive(settings: Settings) -> None:
    with watch(settings) as watched:
        for step in range(800):
            watched.log(step, {"loss": 1.0, "learning_rate": 0.1, "gradient_norm": 1.0})
    (run,) = runs(settings)
    for key in ("loss", "learning_rate", "gradient_norm"):
        assert [step for step, _ in history(settings, run, key)] == list(range(800))


def test_a_resumed_training_goes_on_in_its_run(settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt), watch(settings) as watched:
        for step in range(1, 6):
            watched.log(step, {"loss": 1.0})
        raise KeyboardInterrupt
    (before,) = runs(settings)
    assert before.info.status == "KILLED"
    with watch(settings, params={"global_batch_size": 16, "seed": 3}) as watched:  # from a checkpoint of step 3
        for step in range(4, 9):
            watched.log(step, {"loss": 2.0})
    (run,) = runs(settings)
    assert (run.info.run_id, run.info.status) == (before.info.run_id, "FINISHED")
    assert history(settings, run, "loss") == [(step, 1.0) for step in range(1, 6)] + [(s, 2.0) for s in (6, 7, 8)]
    assert run.data.params == {"global_batch_size": "8", "seed": "3"}
    with watch(settings, training="two"):
        pass
    assert len(runs(settings)) == 2


def end_by_error() -> None:
    raise RuntimeError("out of memory")


def end_by_signal() -> None:
    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("end", "status"), [(end_by_error, "FAILED"), (end_by_signal, "KILLED")])
def test_a_run_ends_as_its_training_did(settings: Settings, end: Callable[[], None], status: str) -> None:
    with pytest.raises((RuntimeError, SystemExit)), watch(settings) as watched:
        watched.log(1, {"loss": 1.0})
        end()
    (run,) = runs(settings)
    assert run.info.status == status
    assert history(settings, run, "loss") == [(1, 1.0)]


def test_a_server_that_is_down_costs_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with watch(Settings(home=tmp_path, mlflow_uri=uri)) as watched:
        watched.log(1, {"loss": 1.0, "learning_rate": 0.1})
    told = capfd.readouterr()
    assert told.out.count("Training goes on without it") == 1
    assert f"train: MLflow {uri}: cannot be used" in told.out
    assert f"train: MLflow {uri}: 2 values not recorded" in told.out
    assert told.err == ""
    assert watched.tracking.dropped == 2


def test_a_server_that_never_answers_is_not_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "QUEUED", 3)
    monkeypatch.setattr(telemetry, "CLOSE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with watch(Settings(home=tmp_path, mlflow_uri=uri)) as watched:
            asked, _ = server.accept()  # and nothing is ever answered
            for step in range(5):
                watched.log(step, {"loss": 1.0})
            assert watched.tracking.dropped == 2
        assert watched.tracking.dropped == 5
        told = capfd.readouterr().out
        assert f"train: MLflow {uri}: does not answer. Training goes on without it" in told
        assert f"train: MLflow {uri}: 5 values not recorded" in told
        asked.close()
    watched.tracking._thread.join()  # leave nothing behind


def test_what_an_outage_held_up_is_sent_after_it(settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    settings.home.mkdir()
    in_the_way = settings.home / "mlflow"
    in_the_way.write_text("no directory")
    with watch(settings) as watched:
        watched.log(1, {"loss": 1.0})
        while not watched.tracking.warned:
            time.sleep(0.01)
        in_the_way.unlink()
        watched.log(2, {"loss": 0.5})
    (run,) = runs(settings)
    assert history(settings, run, "loss") == [(1, 1.0), (2, 0.5)]
    assert watched.tracking.dropped == 0
    assert capfd.readouterr().out.count("Training goes on without it") == 1


def test_prometheus_reads_the_latest_figures(settings: Settings) -> None:
    port = free_port()
    figures = {
        "loss": 1.5,
        "heldout_loss": 1.75,
        "learning_rate": 0.001,
        "gradient_norm": 0.5,
        "tokens_per_second": 250.0,
        "memory_bytes": 4096.0,
        "skipped_steps": 2.0,
    }
    with watch(settings.model_copy(update={"metrics_port": port})) as watched:
        assert scrape(port) == {
            "forge_training_steps": 10,
            "forge_training_step": 0,
            "forge_training_skipped_steps_total": 0,
        }
        watched.log(4, figures)
        watched.log(5, {"loss": 1.25})
        assert scrape(port) == {
            "forge_training_steps": 10,
            "forge_training_step": 5,
            "forge_training_skipped_steps_total": 2,
            "forge_training_loss": 1.25,
            "forge_training_heldout_loss": 1.75,
            "forge_training_learning_rate": 0.001,
            "forge_training_gradient_norm": 0.5,
            "forge_training_tokens_per_second": 250,
            "forge_training_mfu_ratio": 0.5,
            "forge_training_memory_bytes": 4096,
        }
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(port)


def test_a_metrics_port_in_use_is_a_warning(settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with watch(settings.model_copy(update={"metrics_port": port})) as watched:
            watched.log(1, {"loss": 1.0})
    assert f"train: port {port} (FORGE_METRICS_PORT): no metrics there" in capfd.readouterr().out
    assert [run.info.status for run in runs(settings)] == ["FINISHED"]


def test_without_a_gpu_there_are_no_figures_of_one() -> None:
    assert read_gpu(CPU) == {}
    assert gpu_temperature(CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no NVIDIA driver")
def test_without_a_driver_a_gpu_tells_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert read_gpu(torch.device("cuda", 0)) == {}
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU, its driver, and torch's CUDA build (see README.md)"
)
def test_a_gpu_tells_its_figures(settings: Settings) -> None:
    device = torch.device("cuda", 0)
    held = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    figures = read_gpu(device)
    assert 0 < figures["gpu_temperature_celsius"] < 120
    assert 0 < figures["gpu_power_watts"] < 2000
    assert 0 <= figures["gpu_utilization_ratio"] <= 1
    assert figures["gpu_memory_bytes"] >= held.numel()
    port = free_port()
    moved = watch(settings.model_copy(update={"metrics_port": port}))
    moved._device = device
    with moved:
        moved.log(1, {"loss": 1.0})
        assert scrape(port)["forge_gpu_temperature_celsius"] > 0
    assert peak_flops(device, torch.bfloat16) > peak_flops(device, torch.float32)


def test_a_hot_gpu_slows_training_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_monitor, "PAUSE", 0.001)
    monkeypatch.setattr(gpu_monitor, "LONGEST_PAUSE", 0.002)
    sensor = SimpleNamespace(degrees=[])
    cool_down = CoolDown(lambda: sensor.degrees.pop(0), limit=85, rank=1)

    def slept(*degrees: float | None) -> tuple[float, int]:
        """Stretches slept, and warnings told, while the sensor shows these degrees."""
        sensor.degrees = list(degrees)
        pauses = cool_down() / gpu_monitor.PAUSE
        assert sensor.degrees == []
        return pauses, capfd.readouterr().out.count("the GPU of rank 1 has 90 °C")

    assert slept(85) == (0, 0)
    assert slept(90, 84) == (1, 1)  # cool again
    assert slept(90, 90, 90) == (2, 1)  # a new excursion, and the longest pause
    assert slept(90, 86, 80) == (2, 0)  # still the same one
    assert slept(None) == (0, 0)
    assert slept(90, 80) == (1, 1)


@pytest.mark.parametrize("adapter", [False, True])
def test_operations_a_token_are_those_that_torch_counts(adapter: bool) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    context = 64
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=False, attn_implementation="eager", **shape)
    model: Any = LlamaForCausalLM(config)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            sizes[parameter.requires_grad] += parameter.numel()
    tokens = torch.zeros(2, context, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    expected = flops_per_token(sizes[True], sizes[False], config.num_hidden_layers, config.hidden_size, context)
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(expected, rel=0.03)


def test_the_peak_of_a_device_without_a_data_sheet_is_measured() -> None:
    assert 1e6 < peak_flops(CPU, torch.float32) < 1e15
