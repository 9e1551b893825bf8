"""What /metrics tells: requests by route, status and key, time by stage, sizes, refusals. One registry a replica."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily

if TYPE_CHECKING:
    from rayemb.serve.versions.table import Versions

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_HITS = (0, 1, 2, 5, 10, 20, 50, 100)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_BYTES = (256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216)
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
STAGES = ("request", "wait", "embed", "search", "encode", "write")
REFUSALS = ("overloaded", "memory", "rate", "size", "collection", "deadline")


class Metrics:
    """The counters of one gateway.

    With several replicas behind one address a scrape sees the one that answers it: `replica` then is a label of every
    series, so that their counters are not taken for each other's.
    """

    def __init__(self, replica: str = "", *, live: bool = False) -> None:
        """`live`: whether the versions have live updates."""
        self._replica = replica
        # Its own registry: two gateways in one process (tests, reloads) must not share or clash.
        self.registry = CollectorRegistry()
        self.requests = self._counter("rayemb_requests", "Requests answered", "route", "method", "status")
        self.keys = self._counter("rayemb_key_requests", "Requests by the name of their key", "key", "status")
        self.refused = self._counter("rayemb_refused", "Requests refused, by reason", "reason")
        self.missing = self._counter("rayemb_missing_shard", "Searches that a shard did not answer", "shard")
        self.partial = Counter("rayemb_partial", "Searches in which some shards did not answer", registry=self.registry)
        self.seconds = Histogram(
            "rayemb_stage_seconds", "Time by stage", ["stage"], buckets=_SECONDS, registry=self.registry
        )
        self.hits = Histogram("rayemb_hits", "Hits of a query (a batch's mean)", buckets=_HITS, registry=self.registry)
        self.queries = Histogram("rayemb_queries", "Queries of a search", buckets=_QUERIES, registry=self.registry)
        self.read = Histogram("rayemb_request_bytes", "Size of a body taken", buckets=_BYTES, registry=self.registry)
        self.sent = Histogram("rayemb_response_bytes", "Size of an answer", buckets=_BYTES, registry=self.registry)
        self.in_progress = Gauge("rayemb_in_progress", "Requests worked on", registry=self.registry)
        self.waiting = Gauge("rayemb_waiting", "Requests that wait for a place", registry=self.registry)
        self.buffered = Gauge("rayemb_buffered_bytes", "Bodies held in memory", registry=self.registry)
        names = ["collection", "version", "index_version", "model_digest", "role"]
        self.rows = Gauge("rayemb_index_rows", "Items served", names, registry=self.registry)
        self.revision = Gauge("rayemb_catalog_revision", "Revision of the catalog applied", registry=self.registry)
        self.switches = self._counter("rayemb_switches", "Changes of the live version", "collection")
        self.problems = Gauge(
            "rayemb_version_problem", "1: not served as the catalog says", ["what"], registry=self.registry
        )
        self.versions = Histogram(
            "rayemb_version_seconds",
            "Time of the searches that a version answered",
            ["collection", "version"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.failures = self._counter("rayemb_version_failures", "Searches that failed here", "collection", "version")
        version = ["collection", "version"]
        self.overlap = Histogram(
            "rayemb_shadow_overlap",
            "Share of the answer's hits that the shadow found too",
            version,
            buckets=_SHARES,
            registry=self.registry,
        )
        self.shadow_seconds = Histogram(
            "rayemb_shadow_seconds",
            "Time to embed and search, of queries that both answered",
            [*version, "side"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.shadows = self._counter("rayemb_shadow", "Queries for a shadow, by outcome", *version, "outcome")
        self.recall = Gauge(
            "rayemb_recall_at_k", "Recall of queries asked again exactly", [*version, "k"], registry=self.registry
        )
        self.sampled = self._counter("rayemb_recall_samples", "Queries asked again exactly, or not", "outcome")
        self.shift = Gauge(
            "rayemb_query_shift",
            "Squared distance of the queries' mean from the reference's, over the reference's variance",
            version,
            registry=self.registry,
        )
        self.stability = Gauge(
            "rayemb_query_stability",
            "Population stability index of the queries against the reference, mean over directions",
            version,
            registry=self.registry,
        )
        self.alerts = Gauge(
            "rayemb_alert", "1: past its threshold (serve.watch)", [*version, "alert"], registry=self.registry
        )
        # Their version, and how many wait.
        self._updates: tuple[Gauge, ...] = ()
        if live:
            self._updates = (
                Gauge("rayemb_updates_version", "Version of the live updates", version, registry=self.registry),
                Gauge("rayemb_updates", "Live updates that wait to be compacted", version, registry=self.registry),
            )
        self._versions: Versions | None = None
        self._problems: tuple[str, ...] = ()
        self._live: dict[str, str] = {}
        # From the start, at 0: an alert on a rate sees the first event too.
        self.stages = {stage: self.seconds.labels(stage) for stage in STAGES}
        for reason in REFUSALS:
            self.refused.labels(reason)

    def found(self, queries: int, hits: int, missing_shards: list[str]) -> None:
        """Counts a search: its queries, the hits of all of them, the shards that did not answer."""
        self.queries.observe(queries)
        # Once a search: an observation for each of 256 queries would take longer than to parse them.
        self.hits.observe(hits / queries)
        if missing_shards:
            self.partial.inc()
        for shard in missing_shards:
            self.missing.labels(shard).inc()

    def serves(self, versions: "Versions", revision: int = 0, problems: Iterable[str] = ()) -> None:
        """Tells that the table of versions has changed, and what is not as the catalog says."""
        self._versions, self._problems = versions, tuple(problems)
        for collection, each in versions.routes.items():
            if self._live.get(collection, each.live.version) != each.live.version:
                self.switches.labels(collection).inc()
            self._live[collection] = each.live.version
            self.switches.labels(collection)
        self.revision.set(revision)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return bytes(generate_latest(self))

    def collect(self) -> Iterator[Metric]:
        """The registry's families, each sample under the replica's name."""
        hedged = self._look()
        for family in (*self.registry.collect(), hedged):
            if self._replica:
                named = {"replica": self._replica}
                family.samples = [each._replace(labels={**each.labels, **named}) for each in family.samples]
            yield family

    def _look(self) -> Metric:
        """What the versions that answer now tell of themselves; gives the calls that they made again."""
        # When it is asked for: a version goes over to a newer index and takes in updates without telling.
        again = CounterMetricFamily("rayemb_hedged", "Calls made a second time because they were late", labels=["part"])
        for gauge in (self.rows, self.problems, *self._updates):
            gauge.clear()
        for what in self._problems:
            self.problems.labels(what).set(1)
        if self._versions is None:
            return again
        with self._versions.held() as routes:
            for collection, each in routes.items():
                for role, served in each.roles.items():
                    about = served.about
                    names = (collection, served.version, about.index_version, about.model_digest, role)
                    self.rows.labels(*names).set(about.rows)
                    if self._updates:
                        for gauge, value in zip(self._updates, served.engine.updates(), strict=True):
                            gauge.labels(collection, served.version).set(value)
                # The topology with calls has one collection.
                for part, count in each.live.engine.hedged().items():
                    again.add_metric([part], count)
        return again

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, list(labels), registry=self.registry)
