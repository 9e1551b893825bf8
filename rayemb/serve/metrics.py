"""What /metrics tells: requests by route and status, time by stage, hits. One registry a gateway replica."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_HITS = (0, 1, 2, 5, 10, 20, 50, 100)


class Metrics:
    """The counters of one gateway. With several replicas a scrape sees the one that answers it."""

    def __init__(self, index_version: str, model_digest: str, rows: int) -> None:
        # Its own registry: two gateways in one process (tests, reloads) must not share or clash.
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rayemb_requests", "Requests answered", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "rayemb_stage_seconds", "Time by stage", ["stage"], buckets=_SECONDS, registry=self.registry
        )
        self.hits = Histogram("rayemb_hits", "Hits of a search", buckets=_HITS, registry=self.registry)
        self.partial = Counter("rayemb_partial", "Searches in which some shards did not answer", registry=self.registry)
        self.refused = Counter("rayemb_refused", "Requests refused under overload", registry=self.registry)
        self.in_progress = Gauge("rayemb_in_progress", "Requests worked on", registry=self.registry)
        self.waiting = Gauge("rayemb_waiting", "Requests that wait for a place", registry=self.registry)
        served = Gauge("rayemb_index_rows", "Items served", ["index_version", "model_digest"], registry=self.registry)
        served.labels(index_version, model_digest).set(rows)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
