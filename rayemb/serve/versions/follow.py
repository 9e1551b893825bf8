"""A service that follows its catalog: new versions are opened beside the old ones, then the table is replaced."""

import logging
import threading
import time

from rayemb.errors import RayembError
from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import ServeError
from rayemb.serve.metrics import Metrics
from rayemb.serve.versions.catalog import Catalog, Collection, Version
from rayemb.serve.versions.opening import Opener
from rayemb.serve.versions.store import CatalogError, CatalogStore
from rayemb.serve.versions.table import Routes, Served, Versions

logger = logging.getLogger(__name__)

# A version that could not be opened is tried again: its storage may have been away.
_AGAIN_S = 30.0


class CatalogFollower:
    """Keeps `versions` as the catalog says, from a thread of its own; what cannot be opened leaves what was there.

    Raises CatalogError or ServeError at the start if the catalog, or the version that answers requests which name no
    collection, cannot be opened. Problems later are logged, counted in the metrics, and told by `problems`.
    """

    def __init__(self, config: ServeConfig) -> None:
        assert config.catalog is not None
        self.store = CatalogStore(config.catalog)
        self.versions = Versions(config.collection)
        self.catalog = Catalog()
        self.problems: dict[str, str] = {}
        self._config, self._opener = config, Opener(config)
        self._open: dict[tuple[str, str], tuple[Version, Served]] = {}
        self._failed: dict[tuple[str, str], tuple[Version, float]] = {}
        self._metrics: Metrics | None = None
        self._seen: bytes | None = None
        self._changed, self._stopped = threading.Event(), False
        self._applied = threading.Condition()
        self._apply(self.store.read_bytes())
        if config.collection not in self.versions.routes:
            told = "; ".join(self.problems.values()) or "no version of it is live"
            raise ServeError(
                f"collection {config.collection!r} cannot be served: {told}",
                where=self.store.uri,
                fix="add a version and promote it: rayemb collection add, rayemb collection promote",
            )
        self._thread = threading.Thread(target=self._follow, name="rayemb-catalog", daemon=True)

    def start(self, metrics: Metrics) -> None:
        """Begins to follow, and to tell `metrics`."""
        self._metrics = metrics
        self._tell()
        self._thread.start()

    def stop(self) -> None:
        """Ends the following and closes every version."""
        self._stopped = True
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(60)
        self.versions.set({})

    def look(self, revision: int, timeout_s: float) -> bool:
        """Looks at the catalog at once, and waits until its `revision` is applied; whether it was in time. Blocks."""
        self._changed.set()
        with self._applied:
            return self._applied.wait_for(lambda: self.catalog.revision >= revision or self._stopped, timeout_s)

    # -- the thread ------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._stopped:
            self._changed.wait(self._config.catalog_poll_s)
            self._changed.clear()
            if self._stopped:
                return
            try:
                data = self.store.read_bytes()
                again = any(time.monotonic() > until for _, until in self._failed.values())
                if data != self._seen or again:
                    self._apply(data)
                self._solved("catalog")
            except CatalogError as error:
                self._problem("catalog", error)
            except Exception as error:  # the thread must not end: the service would never change again
                logger.exception("the catalog's change could not be applied")
                self._problem("catalog", error)

    def _apply(self, data: bytes) -> None:
        catalog = self.store.parse(data)
        old, table = self.versions.routes, {}
        wanted = {f"{name}/{each}" for name, found in catalog.collections.items() for each in found.roles.values()}
        self.problems = {key: told for key, told in self.problems.items() if key in wanted}
        for name, collection in catalog.collections.items():
            routes = self._routes(name, collection, old.get(name))
            if routes is not None:
                table[name] = routes
        if self.versions.default in old and self.versions.default not in table:
            # Removed by mistake: the service's own collection goes on answering.
            self._problem(self.versions.default, CatalogError("the catalog has no live version of it any more"))
            table[self.versions.default] = old[self.versions.default]
        self.versions.set(table)
        used = {id(served) for routes in table.values() for served in routes.roles.values()}
        self._open = {key: each for key, each in self._open.items() if id(each[1]) in used}
        self._seen = data
        with self._applied:
            self.catalog = catalog
            self._applied.notify_all()
        self._tell()

    def _routes(self, name: str, collection: Collection, old: Routes | None) -> Routes | None:
        """Who answers from now on; of what cannot be opened, who did until now."""
        live = self._opened(name, collection, "live") or (old.live if old else None)
        if live is None:
            return None
        beside = {}
        for role, wanted in (("canary", collection.canary), ("shadow", collection.shadow)):
            served = self._opened(name, collection, role) if wanted else None
            beside[role] = (served, wanted.percent) if served and wanted else None
        return Routes(live, **beside)

    def _opened(self, name: str, collection: Collection, role: str) -> Served | None:
        wanted = collection.roles.get(role)
        if wanted is None:
            return None
        version, key = collection.versions[wanted], (name, wanted)
        if key in self._open and self._open[key][0] == version:
            return self._open[key][1]
        failed = self._failed.get(key)
        if failed and failed[0] == version and time.monotonic() < failed[1]:
            return None
        try:
            engine = self._opener.open(version)
        except (RayembError, OSError, RuntimeError) as error:
            self._failed[key] = version, time.monotonic() + _AGAIN_S
            self._problem(f"{name}/{wanted}", error)
            return None
        self._failed.pop(key, None)
        self._solved(f"{name}/{wanted}")
        served = Served(name, wanted, engine)
        self._open[key] = version, served
        return served

    def _problem(self, what: str, error: Exception) -> None:
        told = f"{type(error).__name__}: {error}"
        if self.problems.get(what) != told:
            logger.error("%s is not served as the catalog says: %s", what, told)
        self.problems = {**self.problems, what: told}
        self._tell()

    def _solved(self, what: str) -> None:
        if what in self.problems:
            self.problems = {key: told for key, told in self.problems.items() if key != what}
            self._tell()

    def _tell(self) -> None:
        if self._metrics is not None:
            self._metrics.serves(self.versions, self.catalog.revision, self.problems)
