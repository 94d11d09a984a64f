"""The figures of a training run while it lasts: in MLflow, and for Prometheus. None of it may slow training down."""

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
from tasks.finetune.gpu_monitor import read_gpu

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

EXPERIMENT = "forge-training"  # a registered model's own runs are in the experiment of its name
TRAINING = "forge.training"  # the tag that a resumed training finds its run by
QUEUED = 100_000  # values that wait for MLflow; more are dropped
A_CALL = 1000  # values; MLflow takes no more
SEND_SECONDS = 5.0
RETRY_SECONDS = 30.0
CLOSE_SECONDS = 20.0  # that the end of training waits for MLflow

# What Prometheus calls them, and what they are.
TRAINING_GAUGES = {
    "loss": ("forge_training_loss", "Mean loss (nats a trained token)"),
    "heldout_loss": ("forge_training_heldout_loss", "Mean loss on held-out rows (nats a trained token)"),
    "learning_rate": ("forge_training_learning_rate", "Learning rate"),
    "gradient_norm": ("forge_training_gradient_norm", "Norm of the gradient before clipping"),
    "tokens_per_second": ("forge_training_tokens_per_second", "Tokens a second, of all processes"),
    "mfu": ("forge_training_mfu_ratio", "Model FLOPs utilisation"),
    "memory_bytes": ("forge_training_memory_bytes", "Memory of the first process"),
}
GPU_GAUGES = {
    "gpu_temperature_celsius": ("forge_gpu_temperature_celsius", "Temperature of the GPU"),
    "gpu_power_watts": ("forge_gpu_power_watts", "Power that the GPU draws"),
    "gpu_utilization_ratio": ("forge_gpu_utilization_ratio", "Share of the time in which the GPU was busy"),
    "gpu_memory_bytes": ("forge_gpu_memory_bytes", "Memory of the GPU in use, by whomever"),
}


class Telemetry(Collector):
    """Records the points of a training run, on its first process.

    MLflow gets them in the run that `training` names, so that a training that is resumed under the same name goes on
    in its run; Prometheus reads the latest from port `settings.metrics_port`, if there is one. Neither may be there,
    and neither is waited for: a server that is down, slow or in the way is worth one printed line.

    `name` is the run's name (the model's), `params` what is noted once (at most 100). `flops_per_token` and
    `peak_flops` (of all processes, a second) make the MFU.
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
        self._mfu_of_a_token = flops_per_token / peak_flops
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
                log.warning(f"port {self._port} (FORGE_METRICS_PORT): no metrics there ({error})")
        self.tracking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run as FINISHED, FAILED, or KILLED (an interrupt, or the SystemExit of a signal's handler)."""
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            self.tracking.close(status)
        finally:
            if self._server:
                server, thread = self._server
                server.shutdown()
                server.server_close()
                thread.join()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures after `step` steps; returns at once.

        Known to Prometheus are those of TRAINING_GAUGES and skipped_steps (so far); MLflow takes any. The MFU (from
        tokens_per_second) and the GPU's figures are added.
        """
        figures = {**figures, **read_gpu(self._device)}
        if "tokens_per_second" in figures:
            figures["mfu"] = figures["tokens_per_second"] * self._mfu_of_a_token
        self._latest = {**self._latest, **figures, "step": step}
        self.tracking.log(step, figures)

    def collect(self) -> Iterator[Family]:
        """The latest figures, for Prometheus."""
        latest = self._latest  # one point, though the next may come
        yield GaugeMetricFamily("forge_training_steps", "Steps that the run will have", self._steps)
        yield GaugeMetricFamily("forge_training_step", "Steps done", latest.get("step", 0))
        yield CounterMetricFamily(
            "forge_training_skipped_steps",
            "Steps left out for a loss or gradient that is not finite or explodes",
            latest.get("skipped_steps", 0),
        )
        for key, (name, meaning) in TRAINING_GAUGES.items():
            if key in latest:
                yield GaugeMetricFamily(name, meaning, latest[key])
        for key, (name, meaning) in GPU_GAUGES.items():
            if key in latest:
                gauge = GaugeMetricFamily(name, meaning, labels=["gpu"])
                gauge.add_metric([str(self._device.index or 0)], latest[key])
                yield gauge


class Tracking:
    """A run in MLflow, written by a thread of its own: importing and opening MLflow takes seconds, a call may hang.

    Values wait in a bounded queue and go out together. After a failure they are kept and tried again later; those
    that the queue has no room for, or that are left at the end, are counted in `dropped`.
    """

    def __init__(self, settings: Settings, name: str, params: Mapping[str, object], training: str) -> None:
        self._settings, self._name, self._training = settings, name, training
        self._params = {key: str(value) for key, value in params.items()}
        self._queue: queue.Queue[tuple[str, float, int, int]] = queue.Queue(QUEUED)
        self._unsent: list[Metric] = []
        self._status = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.dropped = 0
        self.warned = False

    def start(self) -> None:
        """Open the run, in the background."""
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Queue the figures of a step."""
        now = int(time.time() * 1000)
        for key, value in figures.items():
            try:
                self._queue.put_nowait((key, float(value), now, step))
            except queue.Full:
                self.dropped += 1

    def close(self, status: str) -> None:
        """Send what is queued and end the run with a status of MLflow's; waits CLOSE_SECONDS at most."""
        self._status = status
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn("does not answer")
        self.dropped += self._queue.qsize() + len(self._unsent)
        if self.dropped:
            log.warning(f"MLflow {tracking_uri(self._settings)}: {self.dropped:,} values not recorded")

    def _work(self) -> None:
        """What the thread does: open the run once, then send now and then until closed."""
        client, run_id, recorded, pause = None, "", -1, 0.0
        while True:
            closing = self._closing.wait(pause)  # all is queued once this is set
            try:
                if client is None:
                    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # tells of every retry
                    client = open_registry(self._settings)
                if not run_id:
                    run_id, recorded = self._open_run(client)
                self._send(client, run_id, recorded)
                if closing:
                    client.set_terminated(run_id, self._status)
                pause = SEND_SECONDS
            except Exception as error:  # whatever it is, training goes on
                self._warn(str(error).splitlines()[0] if str(error) else type(error).__name__)
                pause = RETRY_SECONDS
            if closing:
                return

    def _open_run(self, client: "MlflowClient") -> tuple[str, int]:
        """The run of this training, found or made, and the last step that it has (-1: none)."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        name = EXPERIMENT + self._settings.name_suffix
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            with contextlib.suppress(MlflowException):  # another training has just made it
                client.create_experiment(name, artifact_location=artifact_root(self._settings))
            experiment = client.get_experiment_by_name(name)
        found = client.search_runs([experiment.experiment_id], f"tags.`{TRAINING}` = '{self._training}'")
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(experiment.experiment_id, tags={TRAINING: self._training}, run_name=self._name)
        run_id = str(run.info.run_id)
        missing = [Param(key, value) for key, value in self._params.items() if key not in run.data.params]
        client.log_batch(run_id, params=missing)
        return run_id, max((metric.step for metric in client.get_metric_history(run_id, "loss")), default=-1)

    def _send(self, client: "MlflowClient", run_id: str, recorded: int) -> None:
        """Empty the queue; what an earlier training recorded, up to a step, is not recorded twice."""
        from mlflow.entities import Metric

        while True:
            while len(self._unsent) < A_CALL and not self._queue.empty():
                key, value, timestamp, step = self._queue.get_nowait()
                if step > recorded:
                    self._unsent.append(Metric(key, value, timestamp, step))
            if not self._unsent:
                return
            client.log_batch(run_id, metrics=self._unsent)
            self._unsent = []

    def _warn(self, reason: str) -> None:
        """Say once that MLflow does not record."""
        if not self.warned:
            self.warned = True
            uri = tracking_uri(self._settings)
            reason = reason if uri in reason else f"MLflow {uri}: {reason}"
            log.warning(f"{reason}. Training goes on without it")
