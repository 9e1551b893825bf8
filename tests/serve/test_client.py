"""The clients over a real socket: both give the same, and retry what passes and nothing else."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from rayemb.serve import AsyncClient, Client, Item, ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.client.calls import wait_before
from rayemb.serve.keys import new_key
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World
from tests.serve.live import listening


@pytest.fixture(scope="module")
def url(local: LocalEngine, config: ServeConfig) -> Iterator[str]:
    with listening(create_app(local, config)) as url:
        yield url


def both(url: str, ask: Callable[[Any], Any], **options: Any) -> tuple[Any, Any]:
    """What the two clients give for the same question."""

    async def later() -> Any:
        async with AsyncClient(url, **options) as client:
            return await ask(client)

    with Client(url, **options) as client:
        return ask(client), asyncio.run(later())


def test_both_search_alike(url: str, world: World, picture: Path) -> None:
    for ask in (
        lambda client: client.search("blue star", k=5),
        lambda client: client.search(image=picture, k=5),
        lambda client: client.search("red", picture.read_bytes(), k=9, filter={"round": False}),
    ):
        one, two = both(url, ask)
        assert one.hits == two.hits
        assert len(one.hits) in (5, 9)
    assert [hit.id for hit in both(url, lambda client: client.search("blue star", k=5))[0].hits] == world.expected(
        world.model.embed_texts(["blue star"])[0], 5
    )


def test_both_search_batches(url: str, world: World) -> None:
    digest = str(world.model.digest)
    for one in both(url, lambda client: client.search_batch(world.vectors[:6], model=digest, k=7, payload=True)):
        for vector, ids, scores, payload in zip(world.vectors, one.ids, one.scores, one.payload, strict=False):
            assert ids == world.expected(vector, 7)
            np.testing.assert_allclose(scores, np.sort(world.vectors @ vector)[::-1][:7], atol=1e-5)
            assert [row["text"] for row in payload] == [
                next(row["text"] for row in world.rows if row["id"] == name) for name in ids
            ]
        assert (len(one.ids), one.model_digest, one.partial) == (6, digest, False)
    one, two = both(url, lambda client: client.search_batch(["red", "blue"], k=3, filter={"colour": "nothing"}))
    assert (one.ids, one.payload) == (two.ids, None) == ([[], []], None)
    assert [scores.shape for scores in one.scores] == [(0,), (0,)]


def test_both_embed_describe_and_fetch(url: str, world: World) -> None:
    for vectors in both(url, lambda client: client.embed(["a", "b c"])):
        np.testing.assert_allclose(vectors, world.model.embed_texts(["a", "b c"]), atol=1e-6)
    one, two = both(url, lambda client: client.index())
    assert one == two
    assert one.rows == 60
    hit = Client(url).search("star", k=1).hits[0]
    for picture in both(url, lambda client: client.image(hit.image_url)):
        assert picture == world.images[[row["id"] for row in world.rows].index(hit.id)]
    for found in both(url, lambda client: client.parse_filter({"size": "40", "round": "false"})):
        assert found == {"size": 40, "round": False}


@pytest.mark.parametrize(
    ("ask", "message", "status", "field"),
    [
        (lambda client: client.search("a", k=51), "k is at most 50", 422, "k"),
        (lambda client: client.search("a", filter={"nosuch": 1}), "no such field", 400, "filter.nosuch"),
        (lambda client: client.embed(["a"] * 9), "at most 8 texts", 400, "input"),
        (lambda client: client.search_batch([[0.5] * 32], model="0" * 64), "another model", 409, "model"),
        (lambda client: client.search_batch([[0.5] * 31], model="0" * 64), "expected 32 numbers", 422, "vectors"),
        (lambda client: client.search_batch([[0.5] * 32]), "digest", 0, ""),
        (lambda client: client.search_batch([0.5]), "vectors", 0, ""),
        (lambda client: client.image("/v1/items/nobody/image"), "no item", 404, "id"),
    ],
)
def test_both_raise_with_the_servers_words(url: str, ask: Any, message: str, status: int, field: str) -> None:
    with pytest.raises(ServeError, match=message) as caught:
        ask(Client(url))
    assert (caught.value.status, caught.value.field) == (status, field)
    assert bool(caught.value.request_id) == bool(status)

    async def later() -> None:
        async with AsyncClient(url) as client:
            await ask(client)

    with pytest.raises(ServeError, match=message):
        asyncio.run(later())


def test_keys_are_sent_and_never_shown(local: LocalEngine, config: ServeConfig, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    secret = new_key(keys, "ann")
    with listening(create_app(local, config.model_copy(update={"keys": keys}))) as url:
        for answer in both(url, lambda client: client.search("a"), key=secret):
            assert len(answer.hits) == 10
        with pytest.raises(ServeError, match="an API key is needed") as caught:
            Client(url).search("a")
        assert (caught.value.status, caught.value.field) == (401, "authorization")
        with pytest.raises(ServeError, match="not known here") as caught:
            Client(url, key=secret + "x").search("a")
        assert secret not in str(caught.value)
        assert secret not in repr(vars(Client(url, key=secret)))


class Moody:
    """A server that answers as it is told to, then well; it remembers what came."""

    def __init__(self) -> None:
        self.mood: list[Response | float] = []
        self.came: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.answer, methods=["GET", "POST"])

    async def answer(self, request: Request) -> Response:
        self.came.append({"at": time.monotonic(), "body": await request.body(), **request.headers})
        now = self.mood.pop(0) if self.mood else JSONResponse({"deleted": 3})
        if isinstance(now, float):
            await asyncio.sleep(now)
            return JSONResponse({"deleted": 0})
        return now


def refusal(status: int, retry_after: str | None = None) -> Response:
    body = {"error": {"type": "x", "message": f"the server's {status}", "field": None, "request_id": "r"}}
    return JSONResponse(body, status, headers={} if retry_after is None else {"Retry-After": retry_after})


@pytest.fixture
def moody() -> Iterator[tuple[Moody, str]]:
    server = Moody()
    with listening(server.app) as url:
        yield server, url


def test_what_passes_is_tried_again(moody: tuple[Moody, str]) -> None:
    server, url = moody
    server.mood = [refusal(503), refusal(429), JSONResponse({"deleted": 3}), refusal(502), refusal(503)]
    assert both(url, lambda client: client.delete(["a"])) == (3, 3)
    assert len(server.came) == 6
    assert {entry["body"] for entry in server.came} == {b'{"ids": ["a"]}'}


def test_not_before_the_server_said(moody: tuple[Moody, str]) -> None:
    server, url = moody
    server.mood = [refusal(429, "1")]
    assert Client(url).delete(["a"]) == 3
    assert server.came[1]["at"] - server.came[0]["at"] >= 1.0
    # Later than the caller would wait: said at once, with the server's words.
    server.mood = [refusal(503, "60")]
    with pytest.raises(ServeError, match="the server's 503"):
        Client(url, timeout_s=5).delete(["a"])
    assert len(server.came) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500, 504])
def test_what_stays_is_not(moody: tuple[Moody, str], status: int) -> None:
    server, url = moody
    server.mood = [refusal(status)]
    with pytest.raises(ServeError, match=f"the server's {status}") as caught:
        Client(url).delete(["a"])
    assert caught.value.status == status
    assert len(server.came) == 1


def test_retries_end(moody: tuple[Moody, str]) -> None:
    server, url = moody
    server.mood = [refusal(503) for _ in range(9)]
    with pytest.raises(ServeError, match="the server's 503"):
        Client(url, retries=3).delete(["a"])
    assert len(server.came) == 4
    with pytest.raises(ServeError):
        Client(url, retries=0).delete(["a"])
    assert len(server.came) == 5


def test_the_server_is_told_how_long_there_is(moody: tuple[Moody, str]) -> None:
    server, url = moody
    server.mood = [refusal(503, "0.5")]
    Client(url, timeout_s=10).delete(["a"])
    first, second = (float(entry["x-request-timeout"]) for entry in server.came)
    assert 9 < first <= 10
    assert second <= first - 0.5
    server.mood = [1.0]
    with pytest.raises(ServeError, match="no answer"):
        Client(url, timeout_s=0.3).delete(["a"])


def test_a_connection_that_breaks_is_opened_again() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count.append(1)
        await reader.readuntil(b"\r\n\r\n")
        if len(count) == 2:
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"deleted": 3}')
            await writer.drain()
        writer.close()

    count: list[int] = []

    async def main() -> int:
        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, AsyncClient(f"http://127.0.0.1:{port}") as client:
            return await client.delete([])

    assert asyncio.run(main()) == 3
    assert len(count) == 2


def test_a_proxys_answer_is_an_error_too(moody: tuple[Moody, str]) -> None:
    server, url = moody
    server.mood = [Response("<html>bad gateway</html>", 500)]
    with pytest.raises(ServeError, match="HTTP 500: <html>bad gateway") as caught:
        Client(url).delete(["a"])
    assert caught.value.status == 500


def test_waits_grow_within_bounds() -> None:
    for attempt, most in ((0, 0.1), (1, 0.2), (3, 0.8), (20, 5.0)):
        waits = [wait_before(attempt, 99, 503, "", 100.0) for _ in range(300)]
        assert all(wait is not None and 0 <= wait <= most for wait in waits)
        assert max(wait or 0.0 for wait in waits) > most * 0.8
    assert wait_before(0, 2, 0, "", 100.0) is not None  # no answer came
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30))
    for retry_after, least in (("2", 2.0), ("0", 0.0), ("soon", 0.0), (date, 28.0), ("-5", 0.0)):
        wait = wait_before(0, 2, 429, retry_after, 100.0)
        assert wait is not None
        assert least <= wait <= least + 2.1


def test_writes_are_what_the_service_will_take(moody: tuple[Moody, str]) -> None:
    server, url = moody
    server.mood = [JSONResponse({"upserted": 1}), JSONResponse({"items": [{"id": "a", "payload": {"n": 1}}]})]
    client = Client(url)
    item = Item("a", text="t", image=b"png", vector=np.array([0.5, 1.0]), payload={"n": 1})
    assert client.upsert([item], model="d") == 1
    assert httpx.Response(200, content=server.came[0]["body"]).json() == {
        "items": [{"id": "a", "text": "t", "image": "cG5n", "vector": [0.5, 1.0], "payload": {"n": 1}}],
        "model": "d",
    }
    assert client.get(["a", "b"]) == {"a": {"n": 1}}
    with pytest.raises(ServeError, match="JSON has no form"):
        client.upsert([Item("a", payload={"n": float("nan")})])


@contextlib.asynccontextmanager
async def closing(client: AsyncClient) -> AsyncIterator[AsyncClient]:
    async with client:
        yield client


def test_many_at_once(url: str, world: World) -> None:
    async def main() -> list[Any]:
        async with closing(AsyncClient(url)) as client:
            return await asyncio.gather(*(client.search(row["text"], k=3) for row in world.rows[:24]))

    vectors = world.model.embed_texts([row["text"] for row in world.rows[:24]])
    for answer, vector in zip(asyncio.run(main()), vectors, strict=True):
        np.testing.assert_allclose(
            [hit.score for hit in answer.hits], np.sort(world.vectors @ vector)[::-1][:3], atol=1e-5
        )
