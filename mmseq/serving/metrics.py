"""`GET /metrics`: what a server does, for Prometheus. Counters are read when they are asked for."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from mmseq.errors import require
from mmseq.serving.service import Service

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SIZES = (1, 2, 4, 8, 16, 32)


class _Counts:
    """A histogram whose `add` costs a request next to nothing."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many lie below), as Prometheus wants them."""
        return list(zip([*map(str, map(float, self.bounds)), "+Inf"], itertools.accumulate(self.counts)))


class Metrics:
    """Of one server. Raises: DependencyError without the `serve` extra."""

    def __init__(self, service: Service, *, stuck_s: float):
        self._client: Any = require("prometheus_client", "serve")
        self._core: Any = require("prometheus_client.core", "serve")
        self.content_type = self._client.CONTENT_TYPE_LATEST
        self._service, self._stuck_s = service, stuck_s
        self._registry = self._client.CollectorRegistry()
        self._registry.register(self)
        self._total, self._model, self._batch = _Counts(SECONDS), _Counts(SECONDS), _Counts(SIZES)
        service.on_reply = self._observe

    def _observe(self, total_s: float, model_s: float, batch: int) -> None:
        self._total.add(total_s)
        self._model.add(model_s)
        self._batch.add(batch)

    def text(self) -> bytes:
        return self._client.generate_latest(self._registry)

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        core, service = self._core, self._service

        def counter(name: str, help: str, labels: list[str], values: Mapping[Any, float]) -> Any:
            family = core.CounterMetricFamily(name, help, labels=labels)
            for key, value in list(values.items()):
                family.add_metric([key] if isinstance(key, str) else list(key), value)
            return family

        def gauge(name: str, help: str, value: float) -> Any:
            return core.GaugeMetricFamily(name, help, value=value)

        def histogram(name: str, help: str, counts: _Counts) -> Any:
            return core.HistogramMetricFamily(name, help, buckets=counts.buckets(), sum_value=counts.sum)

        yield histogram("mmseq_request_seconds", "From arrival to answer", self._total)
        yield histogram("mmseq_model_seconds", "Of the model call", self._model)
        yield histogram("mmseq_batch_size", "Requests that shared a model call", self._batch)
        gate = service.gate.counts
        yield counter("mmseq_requests", "Requests by kind", ["call"], dict(service.requests))
        yield counter("mmseq_errors", "Refused requests by code", ["code"], dict(service.errors))
        outcomes = {
            "checked": gate.chunks,
            "clamped": gate.chunks_clamped,
            "refused": gate.chunks_refused,
            "stale": gate.chunks_stale,
        }
        yield counter("mmseq_safety_chunks", "Chunks of the safety gate by outcome", ["outcome"], outcomes)
        labels = ["embodiment", "axis", "rule"]
        yield counter("mmseq_safety_values", "Numbers that broke a rule of the safety gate", labels, dict(gate.by_axis))
        yield gauge("mmseq_sessions", "Robots that are connected", len(service.sessions))
        yield gauge("mmseq_waiting", "Requests that wait for the model", service.scheduler.waiting)
        yield gauge("mmseq_busy_seconds", "How long the model call under way has taken", service.scheduler.busy_s)
        yield gauge("mmseq_held", "1 while an operator holds every robot", service.held is not None)
        yield gauge("mmseq_ready", "1 when requests should be sent here", service.not_ready(self._stuck_s) is None)
        yield counter("mmseq_reloads", "Times the checkpoint was loaded again", [], {(): service.reloads})
