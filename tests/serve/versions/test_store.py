"""The catalog on S3, where a lock is a claim that nobody else has."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from moto.server import ThreadedMotoServer

from rayemb import storage
from rayemb.serve.versions import Catalog, CatalogStore, Collection, ConflictError
from rayemb.serve.versions import store as store_module


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="catalogs")
    yield "s3://catalogs"
    server.stop()


def test_concurrent_writers_lose_nothing_on_s3(bucket: str) -> None:
    uri = f"{bucket}/shop/catalog.json"

    def write(number: int) -> None:
        def change(catalog: Catalog) -> Catalog:
            return catalog.with_collection(f"c{number}-{len(catalog.collections)}", Collection())

        for _ in range(3):
            CatalogStore(uri).update(change)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    catalog = CatalogStore(uri).read()
    assert catalog.revision == 9
    assert sorted(int(name.split("-")[1]) for name in catalog.collections) == list(range(9))
    assert storage.list_files(f"{uri}.claims") == []


def test_a_claim_of_a_dead_writer_ends(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{bucket}/catalog.json"
    storage.write_bytes(f"{uri}.claims/dead", b"")
    # S3 counts in whole seconds, and on a busy machine the writer's own claim must not end before it has written.
    monkeypatch.setattr(store_module, "CLAIM_S", 4.0)
    assert CatalogStore(uri).update(lambda catalog: catalog).revision == 1


def test_a_writer_that_was_overtaken_writes_nothing(bucket: str) -> None:
    store = CatalogStore(f"{bucket}/catalog.json")
    store.update(lambda catalog: catalog.with_collection("x", Collection()))

    def overtaken(catalog: Catalog) -> Catalog:
        # As another writer does where this one has stopped for so long that its claim counts no more.
        storage.delete(f"{store.uri}.claims")
        return Catalog()

    with pytest.raises(ConflictError, match="took over"):
        store.update(overtaken)
    assert set(store.read().collections) == {"x"}
