"""The service on Ray Serve, over real HTTP: both topologies, what start refuses, a killed shard."""

import http.client
import os
import shutil
import signal
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from ray import serve

from rayemb.cluster import ClusterError
from rayemb.config import ConfigError
from rayemb.index import IndexArtefactError, load_manifest
from rayemb.models import ModelError
from rayemb.serve import Client, ServeConfig, ServeError, app
from rayemb.serve.deploy import APP_NAME, build, cluster_environment, start
from tests.serve.conftest import Service, World, draw

pytestmark = pytest.mark.slow


def test_client_searches_by_text_image_and_both(service: Service, world: World, picture: Path) -> None:
    client = Client(service("together").url)
    vector = world.model.embed_texts(["blue star"])[0]
    answer = client.search("blue star", k=5)
    assert [hit.id for hit in answer.hits] == world.expected(vector, 5)
    assert not answer.partial
    image = world.model.embed_images([picture.read_bytes()])[0]
    assert [hit.id for hit in client.search(image=picture, k=5).hits] == world.expected(image, 5)
    both = (vector + image) / np.linalg.norm(vector + image)
    found = client.search("blue star", picture.read_bytes(), k=5, filter={"shape": "star"})
    assert [hit.id for hit in found.hits] == world.expected(both, 5, lambda row: row["shape"] == "star")
    url = found.hits[0].image_url
    assert url is not None
    assert client.image(url) in world.images


def test_client_embeds_and_describes(service: Service, world: World) -> None:
    client = Client(service("together").url)
    np.testing.assert_allclose(client.embed(["a", "b c"]), world.model.embed_texts(["a", "b c"]), atol=1e-6)
    about = client.index()
    assert (about.rows, about.topology, about.model_digest) == (60, "together", world.model.digest)


def test_client_reads_a_filter_from_texts(service: Service) -> None:
    client = Client(service("together").url)
    texts = {"colour": "blue", "size": "40", "round": "false", "area": "1.6", "nosuch": "x"}
    expected = {"colour": "blue", "size": 40, "round": False, "area": 1.6, "nosuch": "x"}
    assert client.parse_filter(texts) == expected
    for column, text in (("size", "large"), ("round", "maybe")):
        with pytest.raises(ServeError) as caught:
            client.parse_filter({column: text})
        assert caught.value.where == f"filter.{column}"


def test_client_raises_with_the_servers_words(service: Service) -> None:
    client = Client(service("together").url)
    with pytest.raises(ServeError, match="k is at most 50") as caught:
        client.search("a", k=51)
    assert (caught.value.status, caught.value.field) == (422, "k")
    assert caught.value.request_id
    with pytest.raises(ServeError, match=r"filter\.nosuch"):
        client.search("a", filter={"nosuch": 1})
    with pytest.raises(ServeError, match="at most 8 texts"):
        client.embed(["a"] * 9)
    with pytest.raises(ServeError, match="no answer"):
        Client("http://127.0.0.1:1").index()


def test_openai_client_over_a_socket(service: Service, world: World) -> None:
    with openai.OpenAI(api_key="none", base_url=f"{service('together').url}/v1", max_retries=0) as client:
        for encoding in (openai.NOT_GIVEN, "float"):
            answer = client.embeddings.create(model="rayemb", input=["red", "blue"], encoding_format=encoding)
            vectors = np.array([item.embedding for item in answer.data])
            np.testing.assert_allclose(vectors, world.model.embed_texts(["red", "blue"]), atol=1e-6)
        with pytest.raises(openai.BadRequestError, match="token arrays"):
            client.embeddings.create(model="rayemb", input=[1, 2])


def test_an_oversize_body_gets_an_answer_before_the_connection_ends(service: Service) -> None:
    connection = http.client.HTTPConnection(urlsplit(service("together").url).netloc, timeout=20)
    connection.request("POST", "/v1/search", b"x" * 400_000, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 413
    assert b'"field":"body"' in answer.read()
    connection.close()


def test_one_request_id_header(service: Service) -> None:
    request = urllib.request.Request(f"{service('together').url}/healthz", headers={"X-Request-ID": "mine"})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers.get_all("x-request-id") == ["mine"]
    with urllib.request.urlopen(f"{service('together').url}/metrics") as answer:
        assert b"rayemb_requests_total" in answer.read()


def test_start_refuses_a_second_service(service: Service, world: World) -> None:
    service("together")
    with pytest.raises(ServeError, match="runs on this cluster already"):
        start(world.model_uri, world.index_uri, ServeConfig(port=0))


def test_start_refuses_what_cannot_work(world: World, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"serve\.port: port {port} is in use"):
            start(world.model_uri, world.index_uri, ServeConfig(port=port))
    with pytest.raises(ServeError, match=r"serve\.host"):
        start(world.model_uri, world.index_uri, ServeConfig(host="192.0.2.1", port=0, open=True))
    with pytest.raises(IndexArtefactError, match="was built with model"):
        start(world.other_model_uri, world.index_uri, ServeConfig(port=0))
    with pytest.raises(ModelError, match="there is no model here"):
        start(str(tmp_path), world.index_uri, ServeConfig(port=0))
    with pytest.raises(IndexArtefactError, match="there is no index here"):
        start(world.model_uri, str(tmp_path), ServeConfig(port=0))
    with pytest.raises(ClusterError, match="needs 8 CPUs"):
        start(world.model_uri, world.index_uri, ServeConfig(port=0, topology="spread", num_cpus=2))


def test_build_takes_plain_arguments(world: World) -> None:
    args: dict[str, Any] = {"model": world.model_uri, "index": world.index_uri}
    with pytest.raises(ServeError, match=r"args\.serve\.keys"):
        build(args)
    args["serve.open"] = "true"  # as `serve run rayemb.serve:app` passes it
    assert isinstance(build(args), serve.Application)
    assert isinstance(app({**args, "serve": {"topology": "spread", "replicas": 2}}), serve.Application)
    assert isinstance(build({**args, "serve.topology": "spread", "serve.replicas": "2"}), serve.Application)
    with pytest.raises(ConfigError, match=r"serve\.topology"):
        build({**args, "serve": {"topology": "circle"}})
    with pytest.raises(ConfigError, match="index_uri: unknown key"):
        build({**args, "index_uri": "x"})


def test_haproxy_stands_only_where_every_interface_was_asked_for() -> None:
    on = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    assert cluster_environment(ServeConfig(host="0.0.0.0", open=True)) == on
    for host in ("127.0.0.1", "::1", "10.0.0.7"):
        assert cluster_environment(ServeConfig(host=host, open=True)) == {}


def test_spread_equals_together_and_names_a_killed_shard(service: Service, world: World, picture: Path) -> None:
    queries = [
        {"text": "red circle", "k": 50},
        {"image": picture.read_bytes(), "k": 20},
        {"text": "star", "image": draw("red", "star", 60), "k": 20, "filter": {"round": False}},
    ]
    client = Client(service("together").url)
    together = [client.search(**query) for query in queries]
    client = Client(service("spread").url)
    for query, expected in zip(queries, together, strict=True):
        found = client.search(**query)
        assert [hit.id for hit in found.hits] == [hit.id for hit in expected.hits]
        assert [hit.payload for hit in found.hits] == [hit.payload for hit in expected.hits]
        np.testing.assert_allclose([hit.score for hit in found.hits], [hit.score for hit in expected.hits], atol=1e-6)
    assert client.index().topology == "spread"
    with pytest.raises(ServeError, match=r"filter\.nosuch"):
        client.search("a", filter={"nosuch": 1})
    with pytest.raises(ServeError, match="image") as caught:
        client.search(image=b"nothing")
    assert caught.value.status == 422
    url = found.hits[0].image_url
    assert url is not None
    assert client.image(url) in world.images

    pid = serve.get_deployment_handle("shard-1", APP_NAME).ping.remote().result(timeout_s=20)
    os.kill(pid, signal.SIGKILL)
    answers, slowest = [], 0.0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        started = time.monotonic()
        answers.append(client.search("red circle", k=50))
        slowest = max(slowest, time.monotonic() - started)
        if len(answers) > 1 and answers[-2].partial and not answers[-1].partial:
            break
        time.sleep(0.05)
    partial = [answer for answer in answers if answer.partial]
    assert partial, "the killed shard was never missed"
    assert all(answer.missing_shards == ["shard-1"] for answer in partial)
    last = load_manifest(world.index_uri).shards[1].start
    lost = {row["id"] for row in world.rows[last:]}
    assert all(lost.isdisjoint(hit.id for hit in answer.hits) for answer in partial)
    # Never silently: an answer that says it is whole is whole.
    whole = [hit.id for hit in together[0].hits]
    assert all([hit.id for hit in answer.hits] == whole for answer in answers if not answer.partial)
    assert not answers[-1].partial, "the shard did not come back within 60 s"
    assert slowest < ServeConfig().deadline_s + 2.0


def test_a_shard_that_does_not_load_is_told(service: Service, world: World, tmp_path: Path) -> None:
    service.stop()
    shutil.copytree(world.index_uri, tmp_path / "index")
    shard = next((tmp_path / "index").rglob("shard-*.faiss"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ServeError, match=rf"does not come up: .*{shard.name}: the checksum differs"):
        start(world.model_uri, str(tmp_path / "index"), ServeConfig(port=0))
    assert not serve.status().proxies, "half a service stayed behind"
