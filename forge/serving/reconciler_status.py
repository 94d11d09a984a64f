"""What a reconciler says over HTTP: /healthz for a probe, /metrics for Prometheus, /status for rollouts, and /desired,
the document as it was read last, for who may not ask Kubernetes.
"""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from forge.serving.reconciler import Reconciler

STALE = 3600.0  # seconds without a step after which it counts as hung: fetching large weights takes its time


class Status:
    """A server of a reconciler's state, on a port of its own (0: any that is free)."""

    def __init__(self, reconciler: Reconciler, host: str, port: int) -> None:
        self.reconciler = reconciler
        self.stepped = time.monotonic()
        registry = CollectorRegistry()
        registry.register(self)
        status = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, kind, body = 200, "text/plain", b"ok"
                if self.path == "/status":
                    kind, body = "application/json", status.reconciler.actual.model_dump_json().encode()
                elif self.path == "/desired":
                    desired = status.reconciler.desired
                    kind, body = "application/json", desired.model_dump_json().encode() if desired else b"null"
                    code = 200 if desired else 503
                elif self.path == "/metrics":
                    kind, body = "text/plain; version=0.0.4", generate_latest(registry)
                elif self.path != "/healthz":
                    code, body = 404, b"/healthz, /status, /desired, /metrics"
                elif time.monotonic() - status.stepped > STALE:
                    code, body = 503, b"no step for too long"
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass  # probes come every few seconds

        self.http = ThreadingHTTPServer((host, port), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def touch(self) -> None:
        """Say that a step was made."""
        self.stepped = time.monotonic()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self.http.server_port

    def collect(self) -> list[Metric]:
        """The metrics, for prometheus_client."""
        actual, counts = self.reconciler.actual, self.reconciler.counts.versions
        settled = GaugeMetricFamily("forge_serving_as_desired", "1 where all that should be served is")
        settled.add_metric([], float(not actual.waiting))
        generation = GaugeMetricFamily("forge_serving_generation", "Changes of the desired state seen")
        generation.add_metric([], actual.generation)
        failed = GaugeMetricFamily("forge_serving_failed", "What cannot be served", labels=["version"])
        for version in actual.failed:
            failed.add_metric([version], 1)
        leads = GaugeMetricFamily("forge_public_name", "Where public names lead", labels=["name", "version"])
        for name, version in actual.names.items():
            leads.add_metric([name, version], 1)
        flying = GaugeMetricFamily("forge_requests_in_flight", "Requests under way", labels=["version"])
        requests = CounterMetricFamily("forge_requests", "Requests since vLLM started", labels=["version"])
        errors = CounterMetricFamily("forge_request_errors", "Those answered with 5xx, or not", labels=["version"])
        seconds = CounterMetricFamily("forge_request_seconds", "Seconds that they took", labels=["version"])
        for version, count in counts.items():
            flying.add_metric([version], count.in_flight)
            requests.add_metric([version], count.requests)
            errors.add_metric([version], count.errors)
            seconds.add_metric([version], count.seconds)
        loads = CounterMetricFamily("forge_adapter_loads", "Adapters that vLLM has loaded")
        loads.add_metric([], self.reconciler.loads)
        loading = CounterMetricFamily("forge_adapter_load_seconds", "Seconds that vLLM took to load them")
        loading.add_metric([], self.reconciler.load_seconds)
        return [loads, loading, settled, generation, failed, leads, flying, requests, errors, seconds]
