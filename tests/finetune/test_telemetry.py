"""Telemetry records a training run and never blocks it."""

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
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with the embedded MLflow."""
    monkeypatch.setattr(telemetry, "CLOSE_SECONDS", 120)  # a busy machine imports MLflow slowly
    return Settings(home=tmp_path / "home")


def open_telemetry(settings: Settings, training: str = "one", params: dict[str, object] | None = None) -> Telemetry:
    """Telemetry of a training on the CPU with 2 operations per token and a peak of 1,000 per second."""
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
    metrics = open_registry(settings).get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value) for metric in metrics)


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> dict[str, float]:
    """The samples of the metrics endpoint."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_run_is_recorded_in_mlflow(settings: Settings) -> None:
    with open_telemetry(settings) as watched:
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


def test_values_beyond_one_batch_all_arrive(settings: Settings) -> None:
    with open_telemetry(settings) as watched:
        for step in range(800):
            watched.log(step, {"loss": 1.0, "learning_rate": 0.1, "gradient_norm": 1.0})
    (run,) = runs(settings)
    for key in ("loss", "learning_rate", "gradient_norm"):
        assert [step for step, _ in history(settings, run, key)] == list(range(800))


def test_resumed_training_continues_its_mlflow_run(settings: Settings) -> None:
    with pytest.raises(KeyboardInterrupt), open_telemetry(settings) as watched:
        for step in range(1, 6):
            watched.log(step, {"loss": 1.0})
        raise KeyboardInterrupt
    (before,) = runs(settings)
    assert before.info.status == "KILLED"
    with open_telemetry(settings, params={"global_batch_size": 16, "seed": 3}) as watched:  # resumes after step 3
        for step in range(4, 9):
            watched.log(step, {"loss": 2.0})
    (run,) = runs(settings)
    assert (run.info.run_id, run.info.status) == (before.info.run_id, "FINISHED")
    assert history(settings, run, "loss") == [(step, 1.0) for step in range(1, 6)] + [(s, 2.0) for s in (6, 7, 8)]
    assert run.data.params == {"global_batch_size": "8", "seed": "3"}
    with open_telemetry(settings, training="two"):
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
def test_mlflow_run_gets_the_status_of_the_training(settings: Settings, end: Callable[[], None], status: str) -> None:
    with pytest.raises((RuntimeError, SystemExit)), open_telemetry(settings) as watched:
        watched.log(1, {"loss": 1.0})
        end()
    (run,) = runs(settings)
    assert run.info.status == status
    assert history(settings, run, "loss") == [(1, 1.0)]


def test_server_that_is_down_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with open_telemetry(Settings(home=tmp_path, mlflow_uri=uri)) as watched:
        watched.log(1, {"loss": 1.0, "learning_rate": 0.1})
    assert caplog.text.count("Training continues without it") == 1
    assert f"MLflow {uri}: cannot be used" in caplog.text
    assert f"MLflow {uri}: 2 values not recorded" in caplog.text
    assert watched.tracking.dropped == 2


def test_training_does_not_wait_for_a_server_that_never_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "MAX_QUEUED", 3)
    monkeypatch.setattr(telemetry, "CLOSE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with open_telemetry(Settings(home=tmp_path, mlflow_uri=uri)) as watched:
            connection, _ = server.accept()  # and never answer
            for step in range(5):
                watched.log(step, {"loss": 1.0})
            assert watched.tracking.dropped == 2
        assert watched.tracking.dropped == 5
        assert f"MLflow {uri}: does not answer. Training continues without it" in caplog.text
        assert f"MLflow {uri}: 5 values not recorded" in caplog.text
        connection.close()
    watched.tracking._thread.join()  # leave no thread behind


def test_values_of_an_outage_are_sent_after_it(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    settings.home.mkdir()
    obstacle = settings.home / "mlflow"
    obstacle.write_text("not a directory")
    with open_telemetry(settings) as watched:
        watched.log(1, {"loss": 1.0})
        while not watched.tracking.warned:
            time.sleep(0.01)
        obstacle.unlink()
        watched.log(2, {"loss": 0.5})
    (run,) = runs(settings)
    assert history(settings, run, "loss") == [(1, 1.0), (2, 0.5)]
    assert watched.tracking.dropped == 0
    assert caplog.text.count("Training continues without it") == 1


def test_prometheus_reads_the_latest_metrics(settings: Settings) -> None:
    port = free_port()
    metrics = {
        "loss": 1.5,
        "heldout_loss": 1.75,
        "learning_rate": 0.001,
        "gradient_norm": 0.5,
        "tokens_per_second": 250.0,
        "memory_bytes": 4096.0,
        "skipped_steps": 2.0,
    }
    with open_telemetry(settings.model_copy(update={"metrics_port": port})) as watched:
        assert scrape(port) == {
            "forge_training_steps": 10,
            "forge_training_step": 0,
            "forge_training_skipped_steps_total": 0,
        }
        watched.log(4, metrics)
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


def test_metrics_port_in_use_is_a_warning(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with open_telemetry(settings.model_copy(update={"metrics_port": port})) as watched:
            watched.log(1, {"loss": 1.0})
    assert f"port {port} (FORGE_METRICS_PORT): cannot serve metrics" in caplog.text
    assert [run.info.status for run in runs(settings)] == ["FINISHED"]


def test_without_a_gpu_there_are_no_readings() -> None:
    assert read_gpu(CPU) == {}
    assert gpu_temperature(CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without an NVIDIA driver")
def test_without_a_driver_there_are_no_readings(capfd: pytest.CaptureFixture[str]) -> None:
    assert read_gpu(torch.device("cuda", 0)) == {}
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU, its driver, and torch's CUDA build (see README.md)"
)
def test_gpu_readings(settings: Settings) -> None:
    device = torch.device("cuda", 0)
    held = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    readings = read_gpu(device)
    assert 0 < readings["gpu_temperature_celsius"] < 120
    assert 0 < readings["gpu_power_watts"] < 2000
    assert 0 <= readings["gpu_utilization_ratio"] <= 1
    assert readings["gpu_memory_bytes"] >= held.numel()
    port = free_port()
    moved = open_telemetry(settings.model_copy(update={"metrics_port": port}))
    moved._device = device
    with moved:
        moved.log(1, {"loss": 1.0})
        assert scrape(port)["forge_gpu_temperature_celsius"] > 0
    assert peak_flops(device, torch.bfloat16) > peak_flops(device, torch.float32)


def test_hot_gpu_slows_training_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_monitor, "PAUSE", 0.001)
    monkeypatch.setattr(gpu_monitor, "MAX_PAUSE", 0.002)
    sensor = SimpleNamespace(degrees=[])
    cool_down = CoolDown(lambda: sensor.degrees.pop(0), limit=85, rank=1)

    def slept(*degrees: float | None) -> tuple[float, int]:
        """The number of pauses and of warnings while the sensor shows these temperatures."""
        caplog.clear()
        sensor.degrees = list(degrees)
        pauses = cool_down() / gpu_monitor.PAUSE
        assert sensor.degrees == []
        return pauses, caplog.text.count("the GPU of rank 1 has 90 °C")

    assert slept(85) == (0, 0)
    assert slept(90, 84) == (1, 1)  # cooled down
    assert slept(90, 90, 90) == (2, 1)  # hot again, for the maximum pause
    assert slept(90, 86, 80) == (2, 0)  # still hot: no second warning
    assert slept(None) == (0, 0)
    assert slept(90, 80) == (1, 1)


@pytest.mark.parametrize("adapter", [False, True])
def test_flops_per_token_match_torchs_counter(adapter: bool) -> None:
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


def test_peak_without_a_data_sheet_is_measured() -> None:
    assert 1e6 < peak_flops(CPU, torch.float32) < 1e15
