"""What a gateway samples of its queries, and what it tells of them; an answer never waits for any of it."""

import logging
import queue
import random
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb import storage
from rayemb.errors import RayembError
from rayemb.index import Query
from rayemb.serve.engine import Found, Vectors
from rayemb.serve.metrics import Metrics
from rayemb.serve.versions.table import Served
from rayemb.serve.watch.config import WatchConfig
from rayemb.serve.watch.drift import Drift, Reference
from rayemb.serve.watch.exact import ExactProcess

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sample:
    names: tuple[str, str]
    uri: str
    version: int
    vector: NDArray[np.float32]
    keys: NDArray[np.int64]


@dataclass
class _Queries:
    """The queries' vectors of one collection under one model."""

    names: tuple[str, str]
    latest: deque[NDArray[np.float32]]
    reference: Reference | None = None
    looked: bool = False
    since: int = 0
    drift: Drift | None = None


@dataclass
class Watch:
    """The watch of one gateway; its thread begins with the first query that is worth one."""

    config: WatchConfig
    metrics: Metrics
    _waiting: queue.Queue[Any] = field(init=False)
    _recalls: dict[tuple[str, str], deque[float]] = field(default_factory=dict)
    _queries: dict[tuple[str, str], _Queries] = field(default_factory=dict)
    _thread: threading.Thread | None = None
    _exact: ExactProcess = field(default_factory=ExactProcess)

    def __post_init__(self) -> None:
        self._waiting = queue.Queue(self.config.queue)

    def offer(self, served: Served, vector: Vectors | None, wanted: Query, found: Found) -> None:
        """A query `(1, D)` that was answered; on the event loop: takes microseconds, blocks never."""
        if vector is None:
            return
        if self.config.drift:
            self._keep(served, vector[0])
        sampled = self.config.percent and random.random() * 100 < self.config.percent
        if not sampled or not wanted.plain or wanted.filter or wanted.k < self.config.k or found.missing_shards:
            return
        manifest, keys = served.engine.manifest, found.keys[0, : self.config.k]
        if found.updates not in (None, manifest.updates) or found.index_version not in ("", manifest.version):
            # The table that the index was built from is not what was searched: it lacks what was written since.
            self.metrics.sampled.labels("updates").inc()
            return
        table = manifest.embeddings
        names = (served.collection, served.version)
        self._put(_Sample(names, table.uri, table.version, served.engine.mapped(vector)[0], keys))

    def figures(self, collection: str, version: str) -> dict[str, Any]:
        """What is known of a version: recall and its samples, drift."""
        names = (collection, version)
        recalls = list(self._recalls.get(names, ()))
        drifts = [each.drift for each in list(self._queries.values()) if each.names == names and each.drift]
        known: dict[str, Any] = {}
        if recalls:
            known = {f"recall@{self.config.k}": round(float(np.mean(recalls)), 4), "samples": len(recalls)}
        for drift in drifts:
            known |= {"query_shift": round(drift.shift, 4), "query_stability": round(drift.stability, 4)}
        return known

    def close(self) -> None:
        """Ends thread and process."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(30)
        self._exact.close()

    def _keep(self, served: Served, vector: NDArray[np.float32]) -> None:
        key = served.collection, served.about.model_digest
        kept = self._queries.get(key)
        names = (served.collection, served.version)
        if kept is None:
            most = max(self.config.reference_queries, self.config.drift_window)
            kept = self._queries[key] = _Queries(names, deque(maxlen=most))
        kept.names = names
        kept.latest.append(vector)
        kept.since += 1
        wanted = self.config.drift_window if kept.reference else self.config.reference_queries
        first = not kept.looked and self.config.reference is not None
        if first or kept.since >= wanted:
            kept.since, kept.looked = (kept.since if first else 0), True
            self._put((key, kept, list(kept.latest)))

    def _put(self, job: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="rayemb-watch", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            self.metrics.sampled.labels("dropped").inc()

    # -- the thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            try:
                if isinstance(job, _Sample):
                    self._measure(job)
                else:
                    key, kept, vectors = job
                    self._compare(key, kept, np.array(vectors))
            except (RayembError, OSError, ValueError) as error:
                self.metrics.sampled.labels("failed").inc()
                logger.warning("a sample was not measured: %s", error)
            except Exception:
                logger.exception("the quality watch failed on a sample")

    def _measure(self, sample: _Sample) -> None:
        recall = self._exact.recall(sample.uri, sample.version, sample.vector.tolist(), sample.keys.tolist())
        recalls = self._recalls.setdefault(sample.names, deque(maxlen=self.config.window))
        recalls.append(recall)
        mean = float(np.mean(recalls))
        self.metrics.sampled.labels("measured").inc()
        self.metrics.recall.labels(*sample.names, str(self.config.k)).set(mean)
        low = len(recalls) >= self.config.least_samples and mean < self.config.min_recall
        self.metrics.alerts.labels(*sample.names, "recall").set(low)

    def _compare(self, key: tuple[str, str], kept: _Queries, x_ND: NDArray[np.float32]) -> None:
        if kept.reference is None:
            kept.reference = self._reference(key, x_ND)
            return
        drift = kept.drift = kept.reference.drift(x_ND[-self.config.drift_window :])
        self.metrics.shift.labels(*kept.names).set(drift.shift)
        self.metrics.stability.labels(*kept.names).set(drift.stability)
        far = drift.shift > self.config.max_shift or drift.stability > self.config.max_stability
        self.metrics.alerts.labels(*kept.names, "drift").set(far)

    def _reference(self, key: tuple[str, str], x_ND: NDArray[np.float32]) -> Reference | None:
        """The reference that is kept, or these queries if they are enough, which is then kept."""
        uri = None
        if self.config.reference is not None:
            uri = storage.join(self.config.reference, f"{key[0]}-{key[1][:12]}.npz")
            if storage.exists(uri):
                try:
                    return Reference.from_bytes(storage.read_bytes(uri))
                except (ValueError, KeyError, OSError) as error:
                    logger.warning("the reference at %s cannot be read, a new one is taken: %s", uri, error)
        if len(x_ND) < self.config.reference_queries:
            return None
        found = Reference.of(x_ND[-self.config.reference_queries :])
        if uri is not None:
            storage.write_bytes(uri, found.to_bytes())
        return found
