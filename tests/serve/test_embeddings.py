"""POST /v1/embeddings through the real openai client, and what it refuses."""

import base64

import httpx
import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient

from rayemb.serve.asgi import create_app
from rayemb.serve.config import ServeConfig
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World

TEXTS = ["red circle", "a blue star", "ピンクの星"]


@pytest.fixture(scope="module")
def client(local: LocalEngine, config: ServeConfig):
    # The real client over ASGI; test_server.py has it over a socket.
    http = TestClient(create_app(local, config), base_url="http://app")
    with openai.OpenAI(api_key="none", base_url="http://app/v1", http_client=http, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("encoding", [openai.NOT_GIVEN, "base64", "float"])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[0]])
def test_vectors_are_the_models(client: openai.OpenAI, world: World, texts, encoding) -> None:
    answer = client.embeddings.create(model="rayemb", input=texts, encoding_format=encoding)
    expected = world.model.embed_texts([texts] if isinstance(texts, str) else texts)
    vectors = [item.embedding for item in answer.data]
    if encoding == "base64":  # asked for by name, the client leaves it to the caller
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    np.testing.assert_allclose(np.array(vectors), expected, atol=1e-6)
    assert [item.index for item in answer.data] == list(range(len(expected)))
    assert answer.model == world.model.digest
    tokens = int((world.model.tokenizer([texts] if isinstance(texts, str) else texts) != -1).sum())
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens


def test_model_may_be_named_by_its_digest(client: openai.OpenAI, world: World) -> None:
    digest = str(world.model.digest)
    for name in (digest, digest[:12]):
        assert client.embeddings.create(model=name, input="a", dimensions=32).model == digest


@pytest.mark.parametrize(
    ("arguments", "status", "param"),
    [
        ({"input": [1, 2, 3]}, 400, "input"),
        ({"input": [[1, 2], [3]]}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", " "]}, 400, "input.1"),
        ({"input": ["a", 5]}, 400, "input"),
        ({"input": ["a"] * 9}, 400, "input"),
        ({"input": "x" * 101}, 400, "input"),
        ({"input": "a", "dimensions": 16}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "model": "text-embedding-3-small"}, 404, "model"),
        ({"input": "a", "model": ""}, 404, "model"),
        ({"input": "a", "extra_body": {"truncate": True}}, 400, "truncate"),
    ],
    ids=str,
)
def test_errors_are_openais(client: openai.OpenAI, arguments: dict, status: int, param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(**{"model": "rayemb", **arguments})
    error = caught.value
    assert error.status_code == status
    assert isinstance(error, openai.BadRequestError | openai.NotFoundError)
    assert isinstance(error.body, dict)
    assert error.body["param"] == param
    assert error.body["type"] == "invalid_request_error"
    assert set(error.body) == {"message", "type", "param", "code", "request_id"}


@pytest.mark.parametrize("body", [b'{"input": NaN}', b"{", b"[]"])
def test_what_no_client_sends(http: TestClient, body: bytes) -> None:
    answer: httpx.Response = http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "body"


def test_wrong_method_has_openais_shape_too(http: TestClient) -> None:
    answer = http.get("/v1/embeddings")
    assert answer.status_code == 405
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_texts_to_be_found_are_embedded_as_documents(
    client: openai.OpenAI, local: LocalEngine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    documents = local.embed_documents

    async def told(texts: list[str]):  # what it does with a model's prompts is shown where items are written
        asked.append(texts)
        return await documents(texts)

    monkeypatch.setattr(local, "embed_documents", told)
    client.embeddings.create(model="rayemb", input=TEXTS)
    client.embeddings.create(model="rayemb", input=TEXTS, extra_body={"input_type": "query"})
    assert not asked
    answer = client.embeddings.create(model="rayemb", input=TEXTS, extra_body={"input_type": "document"})
    assert asked == [TEXTS]
    assert answer.usage.prompt_tokens == int((world.model.tokenizer(TEXTS) != -1).sum())
    np.testing.assert_allclose([item.embedding for item in answer.data], world.model.embed_texts(TEXTS), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="'query' or 'document'"):
        client.embeddings.create(model="rayemb", input="a", extra_body={"input_type": "passage"})
