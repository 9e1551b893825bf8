"""Versions over gRPC: collections by metadata, a switch, vectors that go to the version they are of."""

import numpy as np
import pytest

from rayemb.models import Model
from rayemb.serve import GrpcClient, ServeError
from rayemb.serve.config import GrpcConfig
from rayemb.serve.versions import CatalogStore, changes
from tests.serve.live import listening
from tests.serve.versions.conftest import Run, Versioned


def test_collections_aliases_and_a_canary(run: Run, store: CatalogStore, versioned: Versioned) -> None:
    versioned.fill(store)
    versioned.fill(store, "icons", "c")
    changes.promote(store, "default", "a")
    changes.promote(store, "icons", "c")
    with run(store, grpc=GrpcConfig(port=0)) as running, listening(running.app):
        address = f"127.0.0.1:{running.app.state.grpc_port}"
        with GrpcClient(address) as default, GrpcClient(address, collection="icons") as icons:
            assert prefixes(default) == ("default", "a", {"a"})
            assert prefixes(icons) == ("icons", "c", {"c"})
            assert (icons.index().collection, icons.index().version) == ("icons", "c")
            running.follow(changes.promote(store, "default", "b").revision)
            assert prefixes(default) == ("default", "b", {"b"})
            assert prefixes(icons) == ("icons", "c", {"c"})
            running.follow(changes.set_canary(store, "default", "a", 50).revision)
            for name in ("a", "b"):
                model = Model.load(versioned.models[name])
                for _ in range(6):
                    found = default.search_batch(model.embed_texts(["red star"]), model=str(model.digest), k=2)
                    assert (found.version, {each[0] for each in found.ids[0]}) == (name, {name})
            with pytest.raises(ServeError) as caught:
                default.search_batch(np.ones((1, 32), np.float32), model="0" * 64)
            assert (caught.value.status, caught.value.field) == (409, "model")


def prefixes(client: GrpcClient) -> tuple[str, str, set[str]]:
    found = client.search("red star", k=4)
    return found.collection, found.version, {hit.id[0] for hit in found.hits}
