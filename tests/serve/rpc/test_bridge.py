"""Calls as requests: each of HTTP's refusals in gRPC's terms; what of the metadata the app sees."""

import asyncio
import json
from typing import Any

import grpc
import pytest
from starlette.types import Receive, Scope, Send

from rayemb.serve.rpc.bridge import Answer, call, refusal, within

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        (400, "malformed_json", Code.INVALID_ARGUMENT),
        (401, "unauthorized", Code.UNAUTHENTICATED),
        (403, "forbidden", Code.PERMISSION_DENIED),
        (404, "collection_not_found", Code.NOT_FOUND),
        (409, "model_mismatch", Code.FAILED_PRECONDITION),
        (413, "too_large", Code.INVALID_ARGUMENT),
        (422, "invalid_request", Code.INVALID_ARGUMENT),
        (429, "rate_limited", Code.RESOURCE_EXHAUSTED),
        (429, "overloaded", Code.RESOURCE_EXHAUSTED),
        (503, "overloaded", Code.RESOURCE_EXHAUSTED),
        (503, "unavailable", Code.UNAVAILABLE),
        (504, "deadline_exceeded", Code.DEADLINE_EXCEEDED),
        (500, "internal", Code.INTERNAL),
    ],
)
def test_each_refusal_has_its_code(status: int, reason: str, code: Any) -> None:
    assert refusal(status, {"type": reason, "message": "m"}, "id").code is code


def test_a_refusal_fits_into_its_trailers() -> None:
    for letter in ("e", "é", "𝄞"):
        told = {"type": "invalid_request", "message": letter * 5000, "field": "filter"}
        found = refusal(422, told, "i" * 64, "1")
        # On the wire bytes are in base64, and each of a text's that is not ASCII is three.
        size = sum(len(key) + len(value) * 4 // 3 for key, value in found.trailing) + 3 * len(found.details.encode())
        assert size < 8192
        assert found.details.startswith(f"filter: {letter * 190}")


class Echo:
    """An app that says what it was asked."""

    def __init__(self, status: int = 200, headers: dict[str, str] | None = None, body: Any = None) -> None:
        self.status, self.headers, self.body = status, headers or {}, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.got = scope, await receive()
        headers = [(key.encode(), value.encode()) for key, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        content = b"answer" if self.body is None else json.dumps(self.body).encode()
        await send({"type": "http.response.body", "body": content[:3], "more_body": True})
        await send({"type": "http.response.body", "body": content[3:]})

    @property
    def seen(self) -> dict[bytes, bytes]:
        found = dict(self.scope["headers"])
        assert len(found) == len(self.scope["headers"]), "a header twice"
        return found


def ask(app: Echo, metadata: Any = (), seconds: float | None = None, name: str = "Search") -> Answer:
    return asyncio.run(call(app, name, b"question", metadata, seconds))


def test_the_app_sees_a_post_of_the_message() -> None:
    app = Echo()
    found = ask(app, [("x-request-id", "mine")])
    assert (found.message, found.code, dict(found.trailing)) == (b"answer", Code.OK, {"x-request-id": "mine"})
    assert (app.scope["method"], app.scope["path"], app.got["body"]) == ("POST", "/v1/search", b"question")


def test_metadata_are_headers_but_for_the_transports_own() -> None:
    app = Echo()
    ask(
        app,
        [
            ("authorization", "Bearer x"),
            ("x-rayemb-client", "ann"),
            ("traceparent", "00-1-2-01"),
            ("content-type", "application/grpc"),
            ("content-encoding", "gzip"),
            ("te", "trailers"),
            ("user-agent", "grpc-python"),
            ("some-bin", b"\x00\xff"),
        ],
    )
    assert set(app.seen) == {b"authorization", b"x-rayemb-client", b"traceparent", b"x-request-id"}


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\nb"])
def test_an_id_that_cannot_stand_in_a_log_is_replaced(given: str) -> None:
    app = Echo()
    found = ask(app, [("x-request-id", given)])
    assert app.seen[b"x-request-id"].decode() == dict(found.trailing)["x-request-id"] != given


def test_serves_own_name_of_the_id_will_do() -> None:
    app = Echo()
    ask(app, [("request_id", "theirs")])
    assert app.seen[b"x-request-id"] == b"theirs"


@pytest.mark.parametrize(
    ("times", "seconds", "seen"),
    [([], None, None), ([], 2.5, 2.5), (["7"], 2.5, 2.5), (["1"], 2.5, 1.0), (["7", "3"], None, 3.0), ([], 0.0, 0.001)],
)
def test_the_deadline_is_the_soonest(times: list[str], seconds: float | None, seen: float | None) -> None:
    app = Echo()
    ask(app, [("x-request-timeout", each) for each in times], seconds)
    given = app.seen.get(b"x-request-timeout")
    assert (given if given is None else float(given)) == seen


def test_what_is_no_time_is_for_the_app_to_refuse() -> None:
    for text in ("soon", "nan", "-1"):
        app = Echo()
        ask(app, [("x-request-timeout", text)], 2.0)
        assert app.seen[b"x-request-timeout"] == text.encode()


def test_serves_proxy_hands_the_deadline_on() -> None:
    assert within([("a", "b")], 1.5) == (("a", "b"), ("x-request-timeout", "1.500000"))
    assert within([("a", "b")], None) == [("a", "b")]


def test_a_collection_is_a_path() -> None:
    app = Echo()
    ask(app, [("x-rayemb-collection", "icons")])
    assert app.scope["path"] == "/collections/icons/v1/search"
    for name in ("../v1/items", "a/b", "a?b", "é", ".."):
        app = Echo()
        found = ask(app, [("x-rayemb-collection", name)])
        assert found.code is Code.NOT_FOUND
        assert not hasattr(app, "scope"), "it went on to the app"


def test_what_an_unready_service_says() -> None:
    app = Echo(503, body={"status": "degraded", "missing_shards": ["embedder"]})
    found = ask(app, name="Health")
    assert (found.code, found.details) == (Code.UNAVAILABLE, "nothing answers: embedder")


def test_a_proxys_page_is_no_stack_trace() -> None:
    found = ask(Echo(502, body="<html>"))
    assert (found.code, found.details) == (Code.INTERNAL, "HTTP 502")
