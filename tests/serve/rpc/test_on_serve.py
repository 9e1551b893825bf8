"""gRPC through Ray Serve's own proxy: the answers are HTTP's, so are refusals, and the deadline reaches the gateway."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from rayemb.serve import Client, GrpcClient, ServeConfig, ServeError
from rayemb.serve.config import GrpcConfig
from rayemb.serve.deploy import start
from rayemb.serve.keys import new_key
from rayemb.serve.rpc import messages
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
                many = list(
                    pool.map(lambda i: client.search_batch(world.vectors[i : i + 1], model=digest, k=3), range(24))
                )
            assert [each.ids[0][0] for each in many] == [row["id"] for row in world.rows[:24]]
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
    # The gateway's own words tell that the deadline reached it: a call with as good as no time left gets an answer
    # from it, or none at all.
    began = time.monotonic()
    refused = stub.refused("Search", question, metadata=[*keyed, ("x-request-timeout", "0.000001")], timeout=20)
    assert (refused.code, refused.status) == (Code.DEADLINE_EXCEEDED, 504)
    assert time.monotonic() - began < 10
    known = ProtoReflectionDescriptorDatabase(channel)
    service = descriptor_pool.DescriptorPool(known).FindServiceByName(messages.SERVICE)
    assert [method.name for method in service.methods] == ["Search", "SearchBatch", "Embed", "Index", "Health"]
