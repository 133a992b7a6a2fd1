"""The federation's state as Prometheus metrics; deploy/grafana/ has a dashboard that reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedsplit.plant.server.status import FederationStatus, RunStatus, SiteStatus

_PER_SITE: tuple[tuple[str, str, Callable[[SiteStatus], float | None]], ...] = (
    ("last_seen_seconds", "Seconds since the site's last report", lambda s: s.last_seen_s),
    ("memory_bytes", "Resident memory of the site's processes", lambda s: s.rss_bytes or None),
    ("disk_free_bytes", "Free bytes on the disk of the site's folder", lambda s: s.disk_free_bytes or None),
    ("backbone_loads", "How often the site's process has loaded the backbone", lambda s: s.backbone_loads),
    ("certificate_left_seconds", "Seconds until the site's certificate ends", lambda s: s.certificate_ends - time.time() if s.certificate_ends else None),
    ("round", "The last round of the present run in which the site answered", lambda s: s.round),
    ("sent_bytes", "Bytes that the site has sent in the present run", lambda s: s.bytes_up),
    ("received_bytes", "Bytes that the site has received in the present run", lambda s: s.bytes_down),
    ("steps_per_second", "Steps a second in the site's last round", lambda s: s.steps_per_s),
)  # fmt: skip
_PER_RUN: tuple[tuple[str, str, Callable[[RunStatus], float | None]], ...] = (
    ("round", "The round that goes on", lambda r: r.round),
    ("rounds", "The rounds that are to be done", lambda r: r.rounds),
    ("replied", "Answers of this round that are in", lambda r: len(r.replied)),
    ("sites", "Sites of the run", lambda r: len(r.sites)),
    ("score", "The main score of the last module over all sites' test samples", lambda r: r.score),
    ("moved_bytes", "Bytes that have moved in the run", lambda r: r.bytes),
    ("seconds", "Seconds since the run's start", lambda r: r.seconds),
)  # fmt: skip


def exposition(now: FederationStatus) -> tuple[bytes, str]:
    """(text, content type) of everything."""
    registry = CollectorRegistry()
    registry.register(_Collected(now))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Collected(Collector):
    def __init__(self, now: FederationStatus) -> None:
        self._now = now

    def collect(self) -> Iterator[Metric]:
        """Everything as gauges: a run's counters begin anew with each run."""
        now = self._now
        yield GaugeMetricFamily("fedsplit_up", "1 where the server is up", value=float(now.up))
        yield _gauge(
            "service_up",
            "1 where the service is up",
            ["service"],
            [([n], s == "up") for n, s in now.services.items()],
        )
        yield _gauge(
            "service_restarts",
            "How often the service was started again",
            ["service"],
            [([n], c) for n, c in now.restarts.items()],
        )
        yield _gauge(
            "site_state",
            "1 for the state that the site is in",
            ["site", "state"],
            [([s.name, s.state], 1) for s in now.sites],
        )
        if (encoder := now.encoder) is not None:
            yield GaugeMetricFamily(
                "fedsplit_encoder_sessions", "Live sessions", value=encoder.live_sessions
            )
            yield GaugeMetricFamily(
                "fedsplit_encoder_kept_bytes",
                "Bytes of graphs that wait for gradients",
                value=encoder.kept_bytes,
            )
            yield GaugeMetricFamily(
                "fedsplit_encoder_memory_bytes",
                "Resident memory of the encoder",
                value=encoder.rss_bytes,
            )
            yield CounterMetricFamily(
                "fedsplit_encoder_sessions_opened",
                "Sessions since its start",
                value=encoder.sessions,
            )
            yield CounterMetricFamily(
                "fedsplit_encoder_steps", "Forward steps since its start", value=encoder.encoded
            )
            yield CounterMetricFamily(
                "fedsplit_encoder_gradients",
                "Backward steps since its start",
                value=encoder.backpropped,
            )
            yield CounterMetricFamily(
                "fedsplit_encoder_predicted",
                "Samples that sites predicted with it since its start",
                value=encoder.predicted,
            )
            refused = CounterMetricFamily(
                "fedsplit_encoder_refused", "Calls that were refused, by reason", labels=["reason"]
            )
            for reason, count in encoder.refused.items():
                refused.add_metric([reason], count)
            yield refused
        for name, what, value in _PER_SITE:
            yield _gauge(f"site_{name}", what, ["site"], [([s.name], value(s)) for s in now.sites])
        if now.run is not None:
            for name, what, of_run in _PER_RUN:
                yield _gauge(f"run_{name}", what, ["run"], [([now.run.name], of_run(now.run))])
        yield _gauge(
            "run_ended",
            "1 for each of the last runs, by its outcome",
            ["run", "outcome"],
            [([r.name, r.phase], 1) for r in now.ended],
        )


def _gauge(
    name: str, what: str, labels: list[str], values: list[tuple[list[str], float | None]]
) -> Metric:
    made = GaugeMetricFamily(f"fedsplit_{name}", what, labels=labels)
    for found, value in values:
        if value is not None:
            made.add_metric(found, float(value))
    return made
