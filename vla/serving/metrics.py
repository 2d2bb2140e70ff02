"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """The metrics.

    Args:
        waiting: returns the number of queued requests.

    Attributes:
        registry: contains all metrics.
        connections: gauge of open websockets.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        labels = ["protocol"]
        self._latency = Histogram(
            "vla_request_seconds",
            "Time from the arrival of a request to its reply.",
            labels,
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._inference = Histogram(
            "vla_inference_seconds", "Decoding time of a batch.", registry=self.registry, buckets=_SECONDS
        )
        self._batch = Histogram(
            "vla_batch_size", "Requests per batch.", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self._errors = Counter(
            "vla_errors", "Requests that failed or were rejected.", [*labels, "kind"], registry=self.registry
        )
        self.connections = Gauge("vla_connections", "Open websockets.", registry=self.registry)
        Gauge("vla_queue", "Queued requests.", registry=self.registry).set_function(waiting)

    def answered(self, protocol: str, seconds: float, inference_seconds: float | None) -> None:
        """Record a reply: its latency, and the decoding time of its batch (None if the reply needed no decoding)."""
        self._latency.labels(protocol).observe(seconds)
        if inference_seconds is not None:
            self._inference.observe(inference_seconds)

    def batch(self, size: int) -> None:
        """Record the size of a batch."""
        self._batch.observe(size)

    def count(self, protocol: str, error: Exception) -> None:
        """Record a failed or rejected request."""
        self._errors.labels(protocol, type(error).__name__).inc()
