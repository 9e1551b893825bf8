"""A version of the catalog, checked against what lies at its URIs, opened and warmed."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from weakref import WeakValueDictionary

import numpy as np

from rayemb import storage
from rayemb.index import load_manifest
from rayemb.models import Model, model_digest
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import check_match
from rayemb.serve.errors import ServeError
from rayemb.serve.local import LocalEngine, check_map
from rayemb.serve.versions.catalog import QueryMapRef, Version
from rayemb.serve.versions.query_map import QueryMap

# Queries that a new engine answers before it gets any from a client: what is loaded lazily is loaded then.
_WARM_QUERIES = 8
_WARM_ROUNDS = 3


def now() -> str:
    """The time, as the catalog has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_version(model_uri: str, index_uri: str, *, query_map: str | None = None, labels: str | None = None) -> Version:
    """The catalog's entry for a model and an index, whose digests are those of this moment.

    Raises ModelError, IndexArtefactError or ServeError where one of them is missing, or if they do not belong together.
    """
    digest = model_digest(model_uri)
    ref = None
    if query_map is None:
        manifest = check_match(digest, index_uri)
    else:
        data = storage.read_bytes(query_map)
        ref = QueryMapRef(uri=storage.normalise(query_map), sha256=storage.sha256_bytes(data))
        check_map(QueryMap.load(ref), Model.load(model_uri), index_uri)
        manifest = load_manifest(index_uri)
    return Version(
        model=storage.normalise(model_uri),
        model_digest=digest,
        index=storage.normalise(index_uri),
        index_version=manifest.version,
        dim=manifest.dim,
        rows=manifest.embeddings.rows,
        added=now(),
        query_map=ref,
        labels=storage.normalise(labels) if labels else None,
    )


class Opener:
    """Opens versions; those of one model share it in memory."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._models: WeakValueDictionary[str, Model] = WeakValueDictionary()

    def open(self, version: Version) -> LocalEngine:
        """An engine that has answered some queries already: every checksum verified, everything in memory.

        Raises ModelError, IndexArtefactError or ServeError if anything is missing, altered or not what it was.
        """
        found = model_digest(version.model)
        if found != version.model_digest:
            raise ServeError(
                f"the model is {found[:12]} and the version was added with {version.model_digest[:12]}",
                where=version.model,
                fix="restore it, or add what is there as a version of its own",
            )
        manifest = load_manifest(version.index)
        if version.index_version not in (manifest.version, manifest.origin):
            raise ServeError(
                f"the index is {manifest.version} and the version was added with {version.index_version}",
                where=version.index,
                fix="build each version into a folder of its own, and add it",
            )
        query_map = QueryMap.load(version.query_map) if version.query_map else None
        model = self._models.get(found)
        if model is None:
            model = Model.load(version.model)
            if model.digest != found:
                raise ServeError("the model changed while it was read", where=version.model, fix="try again")
            self._models[found] = model
        engine = LocalEngine(version.model, version.index, self._config, model=model, query_map=query_map)
        try:
            if version.index_version not in (engine.manifest.version, engine.manifest.origin):
                raise ServeError("the index changed while it was read", where=version.index, fix="try again")
            # A thread of its own, for a loop of its own: a replica begins in one that has a loop.
            with ThreadPoolExecutor(1, "rayemb-warming") as pool:
                pool.submit(asyncio.run, _warm(engine)).result()
        except BaseException:
            engine.close()
            raise
        return engine


async def _warm(engine: LocalEngine) -> None:
    """Asks what clients will ask. Raises ServeError if the answers are none."""
    about, texts = engine.describe(), ["warm", "a longer text to warm the model with"]
    x_ND = engine.index.vectors(np.arange(min(_WARM_QUERIES, about.rows)))
    for _ in range(_WARM_ROUNDS):
        vectors, _ = await engine.embed_texts(texts)
        found = await engine.search(vectors, 10)
        own = await engine.run(engine.index.search, x_ND, 10)
        if not (np.isfinite(found.scores[:, 0]).all() and np.isfinite(own.scores[:, 0]).all()):
            raise ServeError("it finds nothing", where=f"index {about.index_version}", fix="build the index again")
