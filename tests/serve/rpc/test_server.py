"""The service over gRPC, on a real socket: HTTP's answers bit for bit, and its refusals; where it listens."""

import asyncio
import base64
import json
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from rayemb.serve import Client, ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.config import GrpcConfig
from rayemb.serve.local import LocalEngine
from rayemb.serve.rpc import messages
from rayemb.serve.rpc.messages import SearchBatchRequest, SearchRequest
from rayemb.serve.rpc.server import Called, is_local, listening
from tests.serve.conftest import World, draw
from tests.serve.rpc.conftest import Both, Stub, serving
from tests.serve.test_bad_requests import Slow

Code = grpc.StatusCode
TEXTS = ["red star", "ship"]
STAR = '{"shape": "star"}'


def bits(values: Any) -> bytes:
    return np.asarray(values, np.float32).tobytes()


SEARCHES: list[dict[str, Any]] = [
    {"text": "red star", "k": 20},
    {"text": "red star", "filter": {"shape": "star", "size": {"gte": 64}}},
    {"text": "red star", "image": draw("blue", "circle", 60), "k": 5},
    {"image": draw("blue", "circle", 60)},
    {"positive": ["red/star 64?"], "negative": ["blue/star 64?", "pink/star 64?"], "k": 4},
    {"text": "star", "hybrid": {"fusion": "convex", "weight": 0.25}},
    {"text": "star", "hybrid": {}},
    {"text": "star", "group_by": "colour", "group_size": 2, "k": 3},
    {"text": "star", "diversity": 0.5, "k": 6},
    {"text": "star", "min_score": -0.25},
    {"text": "star", "filter": {"colour": "none"}},
    {"text": "star", "effort": {"nprobe": 3}},
]


@pytest.mark.parametrize("fields", SEARCHES, ids=lambda fields: "+".join(fields))
def test_a_search_is_https(both: Both, stub: Stub, fields: dict[str, Any]) -> None:
    image = {} if "image" not in fields else {"image": base64.b64encode(fields["image"]).decode()}
    expected = httpx.post(f"{both.url}/v1/search", json=fields | image).raise_for_status().json()
    wanted = {**fields, "filter": json.dumps(fields["filter"])} if "filter" in fields else fields
    found = stub("Search", SearchRequest(**wanted))
    assert [hit.id for hit in found.hits] == [hit["id"] for hit in expected["hits"]]
    assert bits([hit.score for hit in found.hits]) == bits([hit["score"] for hit in expected["hits"]])
    assert [json.loads(hit.payload) for hit in found.hits] == [hit["payload"] for hit in expected["hits"]]
    assert [hit.image_url for hit in found.hits] == [hit["image_url"] for hit in expected["hits"]]
    for name in ("collection", "version", "index_version", "model_digest", "partial"):
        assert getattr(found, name) == expected[name]
    assert list(found.strategies) == expected["strategies"]
    assert found.timings_ms.total > found.timings_ms.search > 0


@pytest.mark.parametrize("payload", [False, True])
@pytest.mark.parametrize("filter", [None, STAR, '{"colour": "none"}'])
def test_a_batch_is_https_bit_for_bit(both: Both, stub: Stub, world: World, payload: bool, filter: str | None) -> None:
    queries = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32) * 3
    digest = str(world.model.digest)
    common = {"k": 9, "payload": payload}
    asked = SearchBatchRequest(vectors=queries.tobytes(), dim=32, model=digest, filter=filter, **common)
    with Client(both.url) as client:
        conditions = json.loads(filter) if filter else None
        arrow = client.search_batch(queries, model=digest, filter=conditions, **common)
        texts = client.search_batch(TEXTS, filter=conditions, **common)
    same(stub("SearchBatch", asked), arrow)
    found = stub("SearchBatch", SearchBatchRequest(texts=TEXTS, filter=filter, **common))
    same(found, texts)
    plain = httpx.post(f"{both.url}/v1/search/batch", json={"texts": TEXTS, "filter": conditions, **common}).json()
    assert list(found.ids) == flat(plain["ids"])
    assert found.scores == bits(flat(plain["scores"]))


def flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def same(found: Any, expected: Any) -> None:
    assert list(found.counts) == [len(ids) for ids in expected.ids]
    assert list(found.ids) == flat(expected.ids)
    assert found.scores == b"".join(map(bits, expected.scores))
    rows = flat(expected.payload or [])
    assert [json.loads(row) for row in found.payload] == rows
    assert (found.index_version, found.version) == (expected.index_version, expected.version)


def test_embeddings_and_index_are_https(both: Both, stub: Stub) -> None:
    found = stub("Embed", messages.EmbedRequest(input=["red", "blue star"]))
    with Client(both.url) as client:
        assert found.vectors == client.embed(["red", "blue star"]).tobytes()
        about = client.index()
    assert (found.dim, found.model_digest, found.tokens > 2) == (32, about.model_digest, True)
    index = stub("Index")
    assert json.loads(index.document) == about.model_dump(mode="json")
    assert (index.dim, index.rows, index.max_k, index.max_queries) == (32, 60, 50, about.max_queries)
    assert (index.model_digest, index.max_batch, index.max_text_chars) == (about.model_digest, 8, 100)
    assert stub("Health").status == "ok"


X = np.ones((2, 32), np.float32)
NAN, ZERO = X.copy(), X.copy()
NAN[1, 3], ZERO[1] = np.nan, 0
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("Search", {}, "text, image", "give text"),
    ("Search", {"text": "a", "k": 0}, "k", ""),
    ("Search", {"text": "a", "k": -1}, "k", ""),
    ("Search", {"text": "a", "k": 51}, "k", "at most 50"),
    ("Search", {"text": "a", "k": 10**9}, "k", "at most 50"),
    ("Search", {"text": " "}, "text", "empty"),
    ("Search", {"text": "x" * 101}, "text", "over 100"),
    ("Search", {"image": b""}, "image", "empty"),
    ("Search", {"image": b"no picture"}, "image", ""),
    ("Search", {"image": b"x" * 20_001}, "image", "over 20,000"),
    ("Search", {"text": "a", "filter": "{"}, "filter", "not JSON"),
    ("Search", {"text": "a", "filter": "[]"}, "filter", "dictionary"),
    ("Search", {"text": "a", "filter": '{"nosuch": 1}'}, "filter.nosuch", ""),
    ("Search", {"text": "a", "filter": '{"size": NaN}'}, "filter", "not JSON"),
    ("Search", {"text": "a", "recall": float("nan")}, "recall", ""),
    ("Search", {"text": "a", "recall": 0.5, "effort": {"nprobe": 1}}, "effort", "not both"),
    ("Search", {"text": "a", "effort": {"nprobe": 0}}, "effort.nprobe", ""),
    ("Search", {"text": "a", "hybrid": {"fusion": "sum"}}, "hybrid.fusion", ""),
    ("Search", {"text": "a", "group_by": "nosuch"}, "group_by", ""),
    ("Search", {"text": "a", "rerank": 5}, "rerank", "no re-ranking"),
    ("Search", {"text": "a", "at_least": 1}, "at_least", "no updates"),
    ("Search", {"positive": ["x"] * 101}, "positive", ""),
    ("SearchBatch", {}, "texts, vectors", ""),
    ("SearchBatch", {"texts": ["a"], "vectors": X.tobytes(), "dim": 32}, "texts, vectors", ""),
    ("SearchBatch", {"texts": ["a", ""]}, "texts.1", "empty"),
    ("SearchBatch", {"texts": ["a"] * 9}, "texts", "at most 8"),
    ("SearchBatch", {"texts": ["a"], "k": 51}, "k", "at most 50"),
    ("SearchBatch", {"vectors": X.tobytes(), "dim": 32}, "model", "digest"),
    ("SearchBatch", {"vectors": X.tobytes(), "model": "M"}, "dim", "say in dim"),
    ("SearchBatch", {"vectors": X.tobytes(), "dim": 16, "model": "M"}, "dim", "expected 32"),
    ("SearchBatch", {"vectors": X.tobytes()[:-1], "dim": 32, "model": "M"}, "vectors", "whole number"),
    ("SearchBatch", {"vectors": b"", "dim": 32, "model": "M"}, "vectors", "at least one"),
    ("SearchBatch", {"vectors": bytes(257 * 128), "dim": 32, "model": "M"}, "vectors", "at most 256"),
    ("SearchBatch", {"vectors": NAN.tobytes(), "dim": 32, "model": "M"}, "vectors.1", "NaN"),
    ("SearchBatch", {"vectors": ZERO.tobytes(), "dim": 32, "model": "M"}, "vectors.1", "zero"),
    ("Embed", {}, "input", "text"),
    ("Embed", {"input": ["a", " "]}, "input.1", "empty"),
    ("Embed", {"input": ["a"] * 9}, "input", "at most 8"),
    ("Embed", {"input": ["a"], "input_type": "answer"}, "input_type", "query"),
]


@pytest.mark.parametrize(("name", "fields", "field", "told"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(
    stub: Stub, world: World, name: str, fields: dict[str, Any], field: str, told: str
) -> None:
    if fields.get("model") == "M":
        fields = {**fields, "model": str(world.model.digest)}
    refused = stub.refused(name, getattr(messages, f"{name}Request")(**fields))
    assert (refused.code, refused.field) == (Code.INVALID_ARGUMENT, field)
    assert refused.text.startswith(f"{field}: ")
    assert told in refused.text
    assert refused.status in (400, 413, 422)
    assert refused.request_id == refused.trailing["x-request-id"]
    assert refused.retry_s is None
    assert stub("Health").status == "ok"


def test_the_words_are_https(both: Both, stub: Stub) -> None:
    for fields in ({"text": "a", "k": 51}, {"text": "a", "effort": {"nprobe": 0}}, {"positive": ["no such"]}):
        told = httpx.post(f"{both.url}/v1/search", json=fields).json()["error"]
        refused = stub.refused("Search", SearchRequest(**fields))
        assert (refused.field, refused.text) == (told["field"], f"{told['field']}: {told['message']}")
        assert refused.reason == told["type"].upper()


def test_vectors_of_another_model(stub: Stub, world: World) -> None:
    for model in ("0" * 64, "rayemb", ""):
        refused = stub.refused("SearchBatch", SearchBatchRequest(vectors=X.tobytes(), dim=32, model=model))
        assert (refused.code, refused.field, refused.status) == (Code.FAILED_PRECONDITION, "model", 409)
        assert str(world.model.digest) in refused.text
    refused = stub.refused("Embed", messages.EmbedRequest(input=["a"], model="other"))
    assert (refused.code, refused.field) == (Code.NOT_FOUND, "model")


def test_what_is_no_message(stub: Stub) -> None:
    for data in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xff"):  # the last: a text that is not UTF-8
        refused = stub.refused("Search", data)
        assert (refused.code, refused.field) == (Code.INVALID_ARGUMENT, "body")
        assert "rayemb.v1.SearchRequest" in refused.text


def test_what_is_no_method(stub: Stub) -> None:
    for name in ("Delete", "search", "Search/x"):
        with pytest.raises(grpc.RpcError) as caught:
            stub._channel.unary_unary(f"/{messages.SERVICE}/{name}")(b"")
        assert caught.value.code() is Code.UNIMPLEMENTED


def test_a_client_that_has_the_address_alone(both: Both) -> None:
    with grpc.insecure_channel(both.address) as channel:
        known = ProtoReflectionDescriptorDatabase(channel)
        assert messages.SERVICE in known.get_services()
        pool = descriptor_pool.DescriptorPool(known)
        method = pool.FindServiceByName(messages.SERVICE).FindMethodByName("SearchBatch")
        asked, told = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
        assert asked is not SearchBatchRequest
        call = channel.unary_unary(f"/{messages.SERVICE}/SearchBatch", asked.SerializeToString, told.FromString)
        assert list(call(asked(texts=["a", "b"], k=2)).counts) == [2, 2]


def test_calls_at_once_are_not_mixed(both: Both, stub: Stub, world: World) -> None:
    digest, queries = str(world.model.digest), np.random.default_rng(1).standard_normal((48, 32)).astype(np.float32)

    def ask(i: int) -> tuple[list[str], bytes]:
        found = stub("SearchBatch", SearchBatchRequest(vectors=queries[i].tobytes(), dim=32, model=digest, k=8))
        return list(found.ids), found.scores

    alone = [ask(i) for i in range(48)]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert list(pool.map(ask, range(48))) == alone
    for i, (ids, _) in enumerate(alone):
        assert ids == world.expected(queries[i] / np.linalg.norm(queries[i]), 8)


def test_what_fails_here_says_no_more_than_its_id() -> None:
    class Broken(Slow):
        async def embed_texts(self, texts: Sequence[str]) -> tuple[Any, int]:
            raise RuntimeError("secret")

    with serving(Broken()) as both, both.stub() as stub:
        refused = stub.refused("Search", SearchRequest(text="a"), metadata=[("x-request-id", "mine")])
    assert (refused.code, refused.status, refused.request_id) == (Code.INTERNAL, 500, "mine")
    assert "secret" not in repr(refused)


def test_a_service_that_cannot_answer_is_not_ready() -> None:
    class Gone(Slow):
        async def missing(self) -> list[str]:
            return ["embedder"]

    with serving(Gone()) as both, both.stub() as stub:
        refused = stub.refused("Health")
    assert (refused.code, refused.text) == (Code.UNAVAILABLE, "nothing answers: embedder")


def test_a_port_that_is_taken_is_named(local: LocalEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServeConfig(grpc=GrpcConfig(port=taken.getsockname()[1]))

        async def listen() -> None:
            async with listening(create_app(local, config), config):
                pass

        with pytest.raises(ServeError, match=r"serve\.grpc\.port: gRPC cannot listen on 127\.0\.0\.1, port"):
            asyncio.run(listen())


def test_without_being_asked_nothing_listens(local: LocalEngine) -> None:
    assert ServeConfig().grpc is None
    app = create_app(local, ServeConfig())

    async def started() -> bool:
        async with app.router.lifespan_context(app):
            return hasattr(app.state, "grpc_port")

    assert not asyncio.run(started())


def test_it_ends_with_the_app(local: LocalEngine) -> None:
    with serving(local) as both:
        pass
    with both.stub() as stub:
        assert stub.refused("Health", timeout=5).code is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:5000", True),
        ("ipv4:127.8.8.8:5000", True),
        ("ipv6:[::1]:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv6:[::ffff:127.0.0.1]:5000", True),
        ("unix:/run/x", True),
        ("ipv4:10.0.0.7:5000", False),
        ("ipv6:[::ffff:10.0.0.7]:5000", False),
        ("ipv6:[fe80::1]:5000", False),
        ("ipv4:127.0.0.1.evil:5000", False),
        ("", False),
        ("unknown", False),
    ],
)
def test_who_is_of_this_machine(peer: str, local: bool) -> None:
    assert is_local(peer) is local


class Context:
    """What Serve hands to a replica's method."""

    def __init__(self, peer: str) -> None:
        self._peer, self.code, self.details = peer, Code.OK, ""
        self.trailing: list[tuple[str, str]] = []

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("x-request-id", "mine")]

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing: Any) -> None:
        self.trailing = [("request_id", "theirs")] + trailing  # noqa: RUF005 - as Serve's, which takes a list alone


@pytest.mark.parametrize(
    ("host", "peer", "code"),
    [
        ("127.0.0.1", "ipv4:10.0.0.7:5000", Code.PERMISSION_DENIED),
        ("localhost", "ipv4:10.0.0.7:5000", Code.PERMISSION_DENIED),
        ("127.0.0.1", "ipv4:127.0.0.1:5000", Code.OK),
        ("0.0.0.0", "ipv4:10.0.0.7:5000", Code.OK),
        ("", "ipv4:10.0.0.7:5000", Code.OK),  # Serve's own options say where it listens
    ],
)
def test_a_replica_keeps_to_its_machine(local: LocalEngine, host: str, peer: str, code: Any) -> None:
    called = Called()
    called._config = ServeConfig(open=True).model_copy(update={"host": host})
    called._app = create_app(local, called._config, replica="r")
    context = Context(peer)
    answer = asyncio.run(called.Search(SearchRequest(text="red").SerializeToString(), context))
    found = messages.SearchResponse.FromString(answer.SerializeToString())
    assert (context.code, len(found.hits)) == (code, 10 if code is Code.OK else 0)
    assert dict(context.trailing)["x-request-id"] == "mine"
