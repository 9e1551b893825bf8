"""gRPC through Ray Serve's own proxy: the answers are HTTP's, so are refusals, and the deadline reaches the gateway."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from ray.serve._private.grpc_util import gRPCGenericServer

from rayemb.serve import Client, GrpcClient, ServeConfig, ServeError
from rayemb.serve.config import GrpcConfig
from rayemb.serve.deploy import cluster_environment, start
from rayemb.serve.keys import new_key
from rayemb.serve.rpc import messages
from rayemb.serve.rpc.server import add_servicer
from tests.serve.conftest import Service, World
from tests.serve.rpc.conftest import Stub

Code = grpc.StatusCode


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["together", "spread"])
def test_through_serves_proxy(
    service: Service, world: World, config: ServeConfig, tmp_path: Path, topology: str
) -> None:
    service.stop()  # one cluster serves one at a time
    keys, log = str(tmp_path / "keys.json"), tmp_path / "access.log"
    ann, slow = new_key(keys, "ann"), new_key(keys, "slow", per_second=0.1)
    changes = {"topology": topology, "port": 0, "grpc": GrpcConfig(port=0), "keys": keys, "access_log": str(log)}
    with start(world.model_uri, world.index_uri, config.model_copy(update=changes)) as server:
        assert server.grpc is not None
        digest = str(world.model.digest)
        with GrpcClient(server.grpc, key=ann) as client, Client(server.url, key=ann) as over_http:
            assert client.search("red star", k=7).hits == over_http.search("red star", k=7).hits
            for queries, model in ((world.vectors[:9], digest), (["red", "blue star"], None)):
                one, two = (
                    each.search_batch(queries, model=model, k=5, payload=True, filter={"round": False})
                    for each in (client, over_http)
                )
                assert (one.ids, one.payload) == (two.ids, two.payload)
                assert all(map(np.array_equal, one.scores, two.scores))
            assert np.array_equal(client.embed(["a", "b"]), over_http.embed(["a", "b"]))
            assert client.index() == over_http.index()
            with pytest.raises(ServeError, match="at most 50") as caught:
                client.search("a", k=51)
            assert (caught.value.status, caught.value.field) == (422, "k")
            with ThreadPoolExecutor(8) as pool:
                found = pool.map(
                    lambda x_D: client.search_batch(x_D[None], model=digest, k=3).ids[0], world.vectors[:24]
                )
                assert list(found) == [world.expected(x_D, 3) for x_D in world.vectors[:24]]
        with grpc.insecure_channel(server.grpc) as channel:
            refusals_and_metadata(Stub(channel), channel, ann, slow)
        line = json.loads(log.read_text().splitlines()[-1])
        assert line["method"] == "GRPC"
        text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {ann}"}).text
        assert "rayemb_in_progress" in text
        assert 'method="GRPC"' in text


def refusals_and_metadata(stub: Stub, channel: grpc.Channel, ann: str, slow: str) -> None:
    question = messages.SearchRequest(text="red")
    assert stub("Health").status == "ok"
    assert stub.refused("Search", question).code is Code.UNAUTHENTICATED
    keyed = [("authorization", f"Bearer {ann}")]
    stub("Search", question, metadata=[("authorization", f"Bearer {slow}")])
    refused = stub.refused("Search", question, metadata=[("authorization", f"Bearer {slow}")])
    assert (refused.code, refused.status) == (Code.RESOURCE_EXHAUSTED, 429)
    assert refused.retry_s is not None
    assert refused.retry_s >= 5
    assert refused.trailing["grpc-retry-pushback-ms"] == str(refused.retry_s * 1000)
    refused = stub.refused("Search", messages.SearchRequest(), metadata=[*keyed, ("x-request-id", "mine")])
    assert (refused.code, refused.field, refused.request_id) == (Code.INVALID_ARGUMENT, "text, image", "mine")
    assert refused.trailing["x-request-id"] == "mine"
    answer, call = stub.method("Search").with_call(question, metadata=[*keyed, ("x-request-id", "mine")], timeout=20)
    assert answer.request_id == "mine" == dict(call.trailing_metadata())["x-request-id"]
    refused = stub.refused("Search", question, metadata=[*keyed, ("x-request-timeout", "0.000001")])
    assert (refused.code, refused.status) == (Code.DEADLINE_EXCEEDED, 504)
    known = ProtoReflectionDescriptorDatabase(channel)
    service = descriptor_pool.DescriptorPool(known).FindServiceByName(messages.SERVICE)
    assert [method.name for method in service.methods] == ["Search", "SearchBatch", "Embed", "Index", "Health"]


def test_messages_are_bounded_in_serves_proxies() -> None:
    limits = cluster_environment(ServeConfig(grpc=GrpcConfig(), max_buffered_bytes=9_000_000))
    assert set(limits.values()) == {"9000000"}
    assert len(limits) == 2
    assert cluster_environment(ServeConfig()) == {}


def test_serves_proxy_is_told_to_hand_the_deadline_on() -> None:
    seen: list[dict[str, str]] = []

    def factory(service_method: str, streaming_type: object) -> Any:
        async def answer(message: bytes, context: Any) -> bytes:
            seen.append(dict(context.invocation_metadata()))
            context.set_trailing_metadata((("by", service_method),))
            return messages.SearchResponse(request_id=str(len(message))).SerializeToString()

        return answer

    async def ask() -> Any:
        server = gRPCGenericServer(factory)
        add_servicer(None, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            read = messages.SearchResponse.FromString
            method = channel.unary_unary(f"/{messages.SERVICE}/Search", response_deserializer=read)
            call = method(b"abc", timeout=5, metadata=(("a", "b"),))
            answer = await call
            await method(b"")
            trailing = dict(await call.trailing_metadata())
        await server.stop(None)
        return answer, trailing

    answer, trailing = asyncio.run(ask())
    assert (answer.request_id, trailing) == ("3", {"by": f"/{messages.SERVICE}/Search"})
    timed, untimed = seen
    assert timed["a"] == "b"
    assert 4 < float(timed["x-request-timeout"]) < 5.5
    assert "x-request-timeout" not in untimed
