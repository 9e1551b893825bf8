"""Two models and three small indexes whose answers cannot be taken for each other's, built without Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp

from rayemb.index import IndexConfig, measure_recall
from rayemb.index.manifest import publish_manifest
from rayemb.models import Model
from rayemb.serve.asgi import create_app
from rayemb.serve.config import ServeConfig
from rayemb.serve.versions import CatalogStore, changes
from rayemb.serve.versions.follow import CatalogFollower
from tests.index.tables import build_here, write_table
from tests.serve.conftest import draw, tiny_model

TEXTS = [f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "star")]
ROWS = 60
# Long enough that only what the tests ask for makes a service look.
NEVER_S = 600.0


@dataclass(frozen=True)
class Versioned:
    """Version `a` and `c` are of one model, `b` of another; the ids of each begin with its name."""

    models: dict[str, str]
    indexes: dict[str, str]
    folder: Path

    def fill(self, store: CatalogStore, collection: str = "default", *names: str) -> CatalogStore:
        for name in names or ("a", "b"):
            changes.add(store, collection, self.models[name], self.indexes[name], name=name)
        return store


@pytest.fixture(scope="session")
def versioned(tmp_path_factory: pytest.TempPathFactory) -> Versioned:
    folder = tmp_path_factory.mktemp("versions")
    models = {}
    for name, seed in (("a", 1), ("b", 2)):
        model = tiny_model(TEXTS, seed=seed)
        model.save(str(folder / f"model-{name}"))
        models[name] = str(folder / f"model-{name}")
    models["c"] = models["a"]
    indexes = {name: build_version(folder, name, uri) for name, uri in models.items()}
    return Versioned(models, indexes, folder)


def build_version(folder: Path, name: str, model_uri: str, rows: int = ROWS) -> str:
    """An index of version `name`; its payload says the version too."""
    model = Model.load(model_uri)
    vectors = model.embed_texts([f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(rows)])
    ids = [f"{name}-{i}" for i in range(rows)]
    images = [draw("red", "star", 40)] * rows
    table = write_table(
        folder / f"table-{name}", vectors, {"of": [name] * rows}, ids=ids, images=images, digest=str(model.digest)
    )
    index = str(folder / f"index-{name}")
    manifest = build_here(table, index, IndexConfig(factory="Flat", shards=2))
    publish_manifest(index, manifest.model_copy(update={"recall": measure_recall(index, manifest, k=5, queries=20)}))
    return index


@pytest.fixture
def store(tmp_path: Path) -> CatalogStore:
    return CatalogStore(str(tmp_path / "catalog.json"))


@dataclass(frozen=True)
class Running:
    app: ASGIApp
    follower: CatalogFollower

    def follow(self, revision: int) -> None:
        assert self.follower.look(revision, 60), "the change was not applied"


Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    """An app that follows a catalog, which is not looked at unless it is told to."""

    @contextmanager
    def running(store: CatalogStore, **settings: Any) -> Iterator[Running]:
        config = ServeConfig(catalog=store.uri, **{"catalog_poll_s": NEVER_S, **settings})
        follower = CatalogFollower(config)
        app = create_app(follower, config)
        try:
            yield Running(app, follower)
        finally:
            follower.stop()

    return running
