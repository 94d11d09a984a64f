"""Live metrics of a training run, in MLflow and for Prometheus, without slowing training down."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

import torch
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from forge.core.settings import Settings
from forge.registry.mlflow_registry import artifact_root, open_registry, tracking_uri
from tasks.finetune.gpu_monitor import READINGS, read_gpu

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

EXPERIMENT = "forge-training"  # registered models have experiments of their own name
TRAINING = "forge.training"  # the tag by which a resumed training finds its run
MAX_QUEUED = 100_000  # values waiting for MLflow; more are dropped
BATCH = 1000  # values per call, MLflow's limit
SEND_SECONDS = 5.0
RETRY_SECONDS = 30.0
CLOSE_SECONDS = 20.0  # to wait for MLflow at the end

# The metrics of a training run: the keys are MLflow's names and those of `Trainer.metrics`. The MFU is added here.
METRICS = {
    "loss": "Mean loss (nats per trained token)",
    "heldout_loss": "Mean loss on held-out rows (nats per trained token)",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm before clipping",
    "tokens_per_second": "Tokens per second, of all processes",
    "mfu": "Model FLOPs utilisation",
    "memory_bytes": "Memory of the first process",
    "skipped_steps": "Steps skipped because the loss or gradient was not finite or exploded",
}
# In Prometheus, by key: name and description.
TRAINING_GAUGES = {
    key: ("forge_training_mfu_ratio" if key == "mfu" else f"forge_training_{key}", description)
    for key, description in METRICS.items()
    if key != "skipped_steps"  # a counter
}
GPU_GAUGES = {key: (f"forge_{key}", reading.description) for key, reading in READINGS.items()}


class Telemetry(Collector):
    """Records the metrics of a training run, on its first rank.

    MLflow gets them in a run tagged with `training`, so that a resumed training continues its run. Prometheus reads
    the latest values from port `settings.metrics_port`, if that is set. Training never waits for either: if a server is
    down or slow, a warning is logged once.

    `name` is the run's name (the model's); `params` (at most 100) are logged once. The MFU comes from
    `flops_per_token` and `peak_flops` (per second, of all processes).
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        params: Mapping[str, object],
        *,
        training: str,
        steps: int,
        device: torch.device,
        flops_per_token: float,
        peak_flops: float,
    ) -> None:
        self._port, self._steps, self._device = settings.metrics_port, steps, device
        self._mfu_per_token = flops_per_token / peak_flops
        self._latest: dict[str, float] = {}
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self.tracking = Tracking(settings, name, params, training)

    def __enter__(self) -> "Telemetry":
        if self._port:
            registry = CollectorRegistry()
            registry.register(self)
            try:
                self._server = start_http_server(self._port, registry=registry)
            except OSError as error:
                log.warning(f"port {self._port} (FORGE_METRICS_PORT): cannot serve metrics ({error})")
        self.tracking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run as FINISHED, FAILED, or KILLED (by an interrupt, or the SystemExit of a signal handler)."""
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            self.tracking.close(status)
        finally:
            if self._server:
                server, thread = self._server
                server.shutdown()
                server.server_close()
                thread.join()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics after `step` steps, without waiting.

        Adds the MFU (from tokens_per_second) and the GPU's readings. MLflow gets everything, Prometheus what METRICS
        and READINGS name.
        """
        metrics = {**metrics, **read_gpu(self._device)}
        if "tokens_per_second" in metrics:
            metrics["mfu"] = metrics["tokens_per_second"] * self._mfu_per_token
        self._latest = {**self._latest, **metrics, "step": step}
        self.tracking.log(step, metrics)

    def collect(self) -> Iterator[Family]:
        """The latest metrics, for Prometheus."""
        latest = self._latest  # training may replace it meanwhile
        yield GaugeMetricFamily("forge_training_steps", "Total steps of the run", self._steps)
        yield GaugeMetricFamily("forge_training_step", "Steps taken", latest.get("step", 0))
        yield CounterMetricFamily(
            "forge_training_skipped_steps", METRICS["skipped_steps"], latest.get("skipped_steps", 0)
        )
        for key, (name, description) in TRAINING_GAUGES.items():
            if key in latest:
                yield GaugeMetricFamily(name, description, latest[key])
        for key, (name, description) in GPU_GAUGES.items():
            if key in latest:
                gauge = GaugeMetricFamily(name, description, labels=["gpu"])
                gauge.add_metric([str(self._device.index or 0)], latest[key])
                yield gauge


class Tracking:
    """A run in MLflow, written by a separate thread: importing MLflow takes seconds, and a call may hang.

    Values wait in a bounded queue and are sent in batches. After a failure they are kept and sent again later. Values
    that do not fit into the queue, or are left at the end, are counted in `dropped`.
    """

    def __init__(self, settings: Settings, name: str, params: Mapping[str, object], training: str) -> None:
        self._settings, self._name, self._training = settings, name, training
        self._params = {key: str(value) for key, value in params.items()}
        self._queue: queue.Queue[tuple[str, float, int, int]] = queue.Queue(MAX_QUEUED)
        self._unsent: list[Metric] = []
        self._status = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.dropped = 0
        self.warned = False

    def start(self) -> None:
        """Open the run in the background."""
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of a step."""
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            try:
                self._queue.put_nowait((key, float(value), now, step))
            except queue.Full:
                self.dropped += 1

    def close(self, status: str) -> None:
        """Send what is queued and end the run with an MLflow status; waits at most CLOSE_SECONDS."""
        self._status = status
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn("does not answer")
        self.dropped += self._queue.qsize() + len(self._unsent)
        if self.dropped:
            log.warning(f"MLflow {tracking_uri(self._settings)}: {self.dropped:,} values not recorded")

    def _work(self) -> None:
        """The thread: open the run once, then send every few seconds until closed."""
        client, run_id, recorded, pause = None, "", -1, 0.0
        while True:
            closing = self._closing.wait(pause)  # once this is set, nothing more is queued
            try:
                if client is None:
                    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs every retry
                    client = open_registry(self._settings)
                if not run_id:
                    run_id, recorded = self._open_run(client)
                self._send(client, run_id, recorded)
                if closing:
                    client.set_terminated(run_id, self._status)
                pause = SEND_SECONDS
            except Exception as error:  # no error in MLflow may stop training
                self._warn(str(error).splitlines()[0] if str(error) else type(error).__name__)
                pause = RETRY_SECONDS
            if closing:
                return

    def _open_run(self, client: "MlflowClient") -> tuple[str, int]:
        """Find or create the run of this training; returns its ID and its last recorded step (-1 if none)."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        name = EXPERIMENT + self._settings.name_suffix
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            with contextlib.suppress(MlflowException):  # another training has just created it
                client.create_experiment(name, artifact_location=artifact_root(self._settings))
            experiment = client.get_experiment_by_name(name)
        runs = client.search_runs([experiment.experiment_id], f"tags.`{TRAINING}` = '{self._training}'")
        if runs:
            run = runs[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(experiment.experiment_id, tags={TRAINING: self._training}, run_name=self._name)
        run_id = str(run.info.run_id)
        missing = [Param(key, value) for key, value in self._params.items() if key not in run.data.params]
        client.log_batch(run_id, params=missing)
        return run_id, max((metric.step for metric in client.get_metric_history(run_id, "loss")), default=-1)

    def _send(self, client: "MlflowClient", run_id: str, recorded: int) -> None:
        """Send all queued values except those of steps up to `recorded`, which an earlier attempt sent."""
        from mlflow.entities import Metric

        while True:
            while len(self._unsent) < BATCH and not self._queue.empty():
                key, value, timestamp, step = self._queue.get_nowait()
                if step > recorded:
                    self._unsent.append(Metric(key, value, timestamp, step))
            if not self._unsent:
                return
            client.log_batch(run_id, metrics=self._unsent)
            self._unsent = []

    def _warn(self, reason: str) -> None:
        """Warn, once, that MLflow does not record."""
        if not self.warned:
            self.warned = True
            uri = tracking_uri(self._settings)
            reason = reason if uri in reason else f"MLflow {uri}: {reason}"
            log.warning(f"{reason}. Training continues without it")
