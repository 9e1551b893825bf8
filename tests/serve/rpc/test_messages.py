"""The .proto that is shipped: what was compiled is what it says, and what protoc makes of it works unchanged."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from typer.testing import CliRunner

from rayemb.cli import app
from rayemb.serve.api import EmbeddingsRequest, IndexInfo, SearchRequest, SearchResponse
from rayemb.serve.batch import BatchRequest, BatchResponse
from rayemb.serve.errors import ApiError
from rayemb.serve.rpc import messages
from rayemb.serve.rpc.messages import PROTO, SERVICE
from tests.serve.rpc.conftest import Both

COMPILED = PROTO.with_suffix(".binpb")
# A program of somebody who has the .proto and grpcio, and no rayemb.
STOCK = """
import sys
import grpc
sys.path.insert(0, sys.argv[1])
from rayemb.v1 import search_pb2 as pb, search_pb2_grpc
with grpc.insecure_channel(sys.argv[2]) as channel:
    stub = search_pb2_grpc.SearchStub(channel)
    assert stub.Health(pb.HealthRequest()).status == "ok"
    index = stub.Index(pb.IndexRequest())
    embedded = stub.Embed(pb.EmbedRequest(input=["blue star", "red circle"]))
    found = stub.SearchBatch(pb.SearchBatchRequest(
        vectors=embedded.vectors, dim=embedded.dim, model=index.model_digest, k=3, filter='{"round": false}'))
    one = stub.Search(pb.SearchRequest(text="blue star", k=3, filter='{"round": false}'))
    assert list(found.counts) == [3, 3] and len(found.scores) == 24
    assert list(found.ids)[:3] == [hit.id for hit in one.hits]
    try:
        stub.Search(pb.SearchRequest(text="a", k=0))
    except grpc.RpcError as error:
        print(error.code().name, error.details())
"""


def described(data: bytes) -> dict[str, list[tuple[str, str, int, bool, bool]]]:
    """Message -> name, type, number, repeated, optional of its fields."""
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(data).file
    field = descriptor_pb2.FieldDescriptorProto
    return {
        message.name: [
            (
                each.name,
                each.type_name.rpartition(".")[2] or field.Type.Name(each.type).removeprefix("TYPE_").lower(),
                each.number,
                each.label == field.LABEL_REPEATED,
                each.proto3_optional,
            )
            for each in message.field
        ]
        for message in file.message_type
    }


def test_what_was_compiled_is_what_the_text_says() -> None:
    text = re.sub(r"//.*", "", PROTO.read_text())
    told = {}
    for name, body in re.findall(r"message (\w+) \{(.*?)\}", text, re.S):
        fields = re.findall(r"(repeated |optional )?(\w+) (\w+) = (\d+);", body)
        told[name] = [(f[2], f[1], int(f[3]), f[0] == "repeated ", f[0] == "optional ") for f in fields]
    assert told == described(COMPILED.read_bytes())
    methods = re.findall(r"rpc (\w+)\((\w+)\) returns \((\w+)\);", text)
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(COMPILED.read_bytes()).file
    (service,) = file.service
    assert f"{file.package}.{service.name}" == SERVICE
    last = [
        (each.name, *(kind.rpartition(".")[2] for kind in (each.input_type, each.output_type)))
        for each in service.method
    ]
    assert methods == last


def test_its_names_are_those_of_json() -> None:
    fields = {name: {each[0] for each in found} for name, found in described(COMPILED.read_bytes()).items()}
    assert fields["SearchRequest"] == set(SearchRequest.model_fields)
    assert fields["SearchResponse"] == set(SearchResponse.model_fields)
    assert fields["SearchBatchRequest"] == set(BatchRequest.model_fields) | {"dim"}
    assert fields["SearchBatchResponse"] == set(BatchResponse.model_fields) | {"counts"}
    assert fields["EmbedRequest"] < set(EmbeddingsRequest.model_fields)
    assert fields["IndexResponse"] - {"document"} < set(IndexInfo.model_fields)


def test_the_command_prints_it() -> None:
    printed = CliRunner().invoke(app, ["serve", "proto"])
    assert printed.exit_code == 0
    assert printed.output == PROTO.read_text()


def test_a_client_made_of_the_proto_alone(both: Both, tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools makes the client")
    folder = PROTO.parents[2]
    compiled = tmp_path / "search.binpb"
    for output in (f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", f"--descriptor_set_out={compiled}"):
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(folder), output, "rayemb/v1/search.proto"]
        subprocess.run(command, check=True)
    assert described(compiled.read_bytes()) == described(COMPILED.read_bytes())
    command = [sys.executable, "-I", "-c", STOCK, str(tmp_path), both.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "INVALID_ARGUMENT k: Input should be greater than or equal to 1", done.stderr


def test_vectors_may_be_declared_as_packed_floats() -> None:
    x_ND = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    # Field 2, wire type 2: what `repeated float vectors = 2` is by default.
    packed = bytes([2 << 3 | 2, x_ND.nbytes]) + x_ND.tobytes()
    assert packed == messages.SearchBatchRequest(vectors=messages.floats(x_ND)).SerializeToString()
    _, read = messages.batch_fields(messages.SearchBatchRequest(vectors=x_ND.tobytes(), dim=4).SerializeToString(), 4)
    assert read is not None
    assert np.array_equal(read, x_ND)


def test_what_is_set_is_a_field_and_nothing_else() -> None:
    request = messages.SearchRequest(text="", k=0, positive=["a", "b"], effort={"nprobe": 0}, filter='{"a": 1}')
    fields = messages.fields_of(request)
    assert fields == {"text": "", "k": 0, "positive": ["a", "b"], "effort": {"nprobe": 0}, "filter": {"a": 1}}
    assert messages.fields_of(messages.SearchRequest()) == {}


@pytest.mark.parametrize(
    ("vectors", "dim", "field", "told"),
    [
        (b"\0" * 32, None, "dim", "how many numbers"),
        (b"\0" * 32, 4, "dim", "expected 8 numbers, got 4"),
        (b"\0" * 31, 8, "vectors", "31 bytes are no whole number of vectors of 8 float32"),
        (b"\0" * 48, 8, "vectors", "48 bytes"),
    ],
)
def test_vectors_of_another_shape(vectors: bytes, dim: int | None, field: str, told: str) -> None:
    data = messages.SearchBatchRequest(vectors=vectors, dim=dim).SerializeToString()
    with pytest.raises(ApiError, match=told) as caught:
        messages.batch_fields(data, 8)
    assert (caught.value.status, caught.value.field) == (422, field)
