"""What a service has answered and how long it took, for /health and, in Prometheus' form, for /metrics."""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from fedsplit.core.extras import extra
from fedsplit.predict.serve.answering import Answering

_REMEMBERED = 1000
"""Requests of which the percentiles are taken."""
_BOUNDS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Counts:
    """Requests to predict since the start. Safe to use from several threads."""

    def __init__(self) -> None:
        self.began = time.time()
        """Seconds since the epoch."""
        self._lock = threading.Lock()
        self._statuses: Counter[int] = Counter()
        self._samples = 0
        self._seconds = 0.0
        self._buckets = [0] * (len(_BOUNDS_S) + 1)
        self._last_s: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, status: int, seconds: float, samples: int) -> None:
        """One request that got an answer with this status."""
        with self._lock:
            self._statuses[status] += 1
            if status != 200:
                return
            self._samples += samples
            self._seconds += seconds
            self._buckets[bisect.bisect_left(_BOUNDS_S, seconds)] += 1
            self._last_s.append(seconds)

    def shown(self) -> dict[str, Any]:
        """As /health has it; milliseconds of the last requests that were answered."""
        with self._lock:
            last = sorted(self._last_s)
            answered = self._statuses[200]
            others = sum(self._statuses.values()) - answered
            found: dict[str, Any] = {
                "answered": answered, "refused": others, "samples": self._samples,
            }  # fmt: skip
        for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99)):
            found[name] = round(1000 * last[int(share * (len(last) - 1))], 2) if last else None
        return found

    def taken(self) -> tuple[dict[int, int], int, float, list[tuple[str, float]]]:
        """(requests by status, samples, seconds in all, cumulative buckets as Prometheus has them)."""
        with self._lock:
            sums = [sum(self._buckets[: i + 1]) for i in range(len(self._buckets))]
            names = [*map(str, _BOUNDS_S), "+Inf"]
            buckets = [(name, float(count)) for name, count in zip(names, sums, strict=True)]
            return dict(self._statuses), self._samples, self._seconds, buckets


def exposition(counts: Counts, answering: Answering) -> tuple[bytes, str]:
    """(text, content type) for Prometheus. Raises ConfigError where its client is not installed."""
    with extra("server", "metrics in the form of Prometheus"):
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
            Metric,
        )
        from prometheus_client.registry import Collector

    class Collected(Collector):
        def collect(self) -> Iterator[Metric]:
            statuses, samples, seconds, buckets = counts.taken()
            requests = CounterMetricFamily(
                "fedsplit_serve_requests", "Requests to predict, by status", labels=["status"]
            )
            for status, count in statuses.items():
                requests.add_metric([str(status)], count)
            yield requests
            yield CounterMetricFamily("fedsplit_serve_samples", "Samples answered", value=samples)
            yield CounterMetricFamily(
                "fedsplit_serve_batches", "Batches computed", value=answering.batches
            )
            yield CounterMetricFamily(
                "fedsplit_serve_swaps",
                "Modules put into use after the first",
                value=answering.swaps,
            )
            yield HistogramMetricFamily(
                "fedsplit_serve_seconds",
                "Seconds from a request's head to its answer",
                buckets=buckets,
                sum_value=seconds,
            )
            yield GaugeMetricFamily(
                "fedsplit_serve_waiting", "Samples taken and not answered", value=answering.waiting
            )
            if (predictor := answering.predictor) is not None:
                module = InfoMetricFamily("fedsplit_serve_module", "The module in use")
                module.add_metric(
                    [], {"digest": predictor.found.digest, "task": predictor.found.task}
                )
                yield module

    registry = CollectorRegistry()
    registry.register(Collected())
    return generate_latest(registry), CONTENT_TYPE_LATEST
