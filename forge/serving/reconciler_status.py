"""The reconciler's HTTP server: /healthz for probes, /metrics for Prometheus, /status for rollouts, and /desired.

/desired is the document as last read, for programs without rights in Kubernetes.
"""

import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from forge.serving.reconciler import Reconciler

STALE = 3600.0  # seconds without a step after which it counts as hung: a step may download large weights


class Status:
    """Serves a reconciler's state on a port (0: any free one)."""

    def __init__(self, reconciler: Reconciler, host: str, port: int) -> None:
        self.reconciler = reconciler
        self.stepped = time.monotonic()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        status = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, kind, body = status.answer(self.path)
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass  # probes would fill the log

        self.http = ThreadingHTTPServer((host, port), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """The HTTP status, content type and body for a path."""
        match path:
            case "/healthz":
                if time.monotonic() - self.stepped > STALE:
                    return 503, "text/plain", b"no step for too long"
                return 200, "text/plain", b"ok"
            case "/status":
                return 200, "application/json", self.reconciler.actual.model_dump_json().encode()
            case "/desired":
                if (desired := self.reconciler.desired) is None:
                    return 503, "application/json", b"null"
                return 200, "application/json", desired.model_dump_json().encode()
            case "/metrics":
                return 200, "text/plain; version=0.0.4", generate_latest(self.registry)
            case _:
                return 404, "text/plain", b"/healthz, /status, /desired, /metrics"

    def touch(self) -> None:
        """Note that a step has been made."""
        self.stepped = time.monotonic()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.http.server_port

    def collect(self) -> list[Metric]:
        """The metrics, as prometheus_client collects them."""
        actual, counts = self.reconciler.actual, self.reconciler.counts.versions
        return [
            _counter("forge_adapter_loads", "Adapters that vLLM has loaded", self.reconciler.loads),
            _counter("forge_adapter_load_seconds", "Time that vLLM took to load them", self.reconciler.load_seconds),
            _gauge("forge_serving_as_desired", "1 if the actual state is the desired one", not actual.waiting),
            _gauge("forge_serving_generation", "Generation of the desired state last seen", actual.generation),
            _by_version(
                GaugeMetricFamily,
                "forge_serving_failed",
                "Versions that cannot be served",
                dict.fromkeys(actual.failed, 1),
            ),
            _public_names(actual.names),
            _by_version(
                GaugeMetricFamily,
                "forge_requests_in_flight",
                "Requests in flight",
                {version: count.in_flight for version, count in counts.items()},
            ),
            _by_version(
                CounterMetricFamily,
                "forge_requests",
                "Requests since vLLM started",
                {version: count.requests for version, count in counts.items()},
            ),
            _by_version(
                CounterMetricFamily,
                "forge_request_errors",
                "Requests that failed or were answered with 5xx",
                {version: count.errors for version, count in counts.items()},
            ),
            _by_version(
                CounterMetricFamily,
                "forge_request_seconds",
                "Total duration of the requests",
                {version: count.seconds for version, count in counts.items()},
            ),
        ]


def _counter(name: str, description: str, value: float) -> Metric:
    metric = CounterMetricFamily(name, description)
    metric.add_metric([], value)
    return metric


def _gauge(name: str, description: str, value: float) -> Metric:
    metric = GaugeMetricFamily(name, description)
    metric.add_metric([], float(value))
    return metric


def _by_version(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, description: str, values: Mapping[str, float]
) -> Metric:
    metric = kind(name, description, labels=["version"])
    for version, value in values.items():
        metric.add_metric([version], value)
    return metric


def _public_names(names: Mapping[str, str]) -> Metric:
    """A constant 1 for each pair of a public name and the version that it points to."""
    metric = GaugeMetricFamily("forge_public_name", "The version of each public name", labels=["name", "version"])
    for name, version in names.items():
        metric.add_metric([name, version], 1)
    return metric
