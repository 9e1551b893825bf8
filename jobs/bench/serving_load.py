"""Load for `serving.py`: closed-loop clients in a process of their own, over HTTP or through a peer's own client.

Run as `serving_load.py SPEC`; takes commands as lines of JSON and answers each with one. Only NumPy and the standard
library, so that the peers' environment can run it too; `orjson` and `uvloop` where they are.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# Rows of each query, best first.
Rows = Sequence[Sequence[int]]


class Client(Protocol):
    """One connection to a system, used by one thread."""

    def search(self, queries: Floats, parameter: int) -> Rows:
        """The ten nearest rows of each query `(N, D)`."""
        ...


def figures(took: Sequence[float], batch: int, wall: float, cpu: float, failed: int) -> dict[str, float]:
    """What some clients got: queries a second, time a request, the generator's own share of a core."""
    p50, p95, p99 = np.percentile(took, [50, 95, 99]) * 1000 if len(took) else (np.nan,) * 3
    return {
        "qps": len(took) * batch / wall,
        "p50": float(p50),
        "p95": float(p95),
        "p99": float(p99),
        "generator": cpu / wall,
        "failed": failed,
    }


# -- through a peer's own client ---------------------------------------------------------------------------------


class Threads:
    """Clients that block: each has a thread and a connection."""

    def __init__(self, connect: Callable[[], Client], queries: Floats) -> None:
        self._connect, self._queries = connect, queries
        self._clients = [connect()]

    def rows(self, count: int, parameter: int) -> Rows:
        """The answers to the first `count` queries."""
        return [list(self._clients[0].search(query[None], parameter)[0]) for query in self._queries[:count]]

    def load(self, clients: int, seconds: float, batch: int, parameter: int) -> dict[str, float]:
        """As many clients as told, each with one request after another."""
        while len(self._clients) < clients:
            self._clients.append(self._connect())
        took: list[float] = []
        failed: list[str] = []
        parts = [self._queries[i : i + batch] for i in range(0, len(self._queries) - batch + 1, batch)]
        begin = threading.Barrier(clients + 1)
        until = 0.0

        def run(number: int, client: Client) -> None:
            i = number * 7
            client.search(parts[i % len(parts)], parameter)  # the first one sets up what later ones use
            begin.wait()
            begin.wait()
            while (started := time.perf_counter()) < until:
                i += 1
                try:
                    client.search(parts[i % len(parts)], parameter)
                    took.append(time.perf_counter() - started)
                except Exception as error:
                    failed.append(repr(error))

        threads = [threading.Thread(target=run, args=each) for each in enumerate(self._clients[:clients])]
        for thread in threads:
            thread.start()
        begin.wait()
        started, cpu = time.perf_counter(), time.process_time()
        until = started + seconds
        begin.wait()
        for thread in threads:
            thread.join()
        return figures(took, batch, time.perf_counter() - started, time.process_time() - cpu, len(failed))


# -- over HTTP ---------------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """A kept-open HTTP/1.1 connection with one request at a time: far cheaper than a client library, so that the
    generator is not what is measured.
    """

    def __init__(self) -> None:
        self._data = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: Any) -> None:
        """It is open."""
        self._transport = transport

    def ask(self, request: bytes) -> "asyncio.Future[tuple[int, bytes]]":
        """Status and body of the answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self._data = b""
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        """A part of an answer."""
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0 or self._answer is None:
            return
        head = self._data[:end].lower()
        at = head.find(b"content-length:")
        if at >= 0:
            size = int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(self._data) - end - 4 < size:
                return
            body = self._data[end + 4 :]
        elif self._data.endswith(b"0\r\n\r\n"):
            body = dechunked(self._data[end + 4 :])
        else:
            return
        answer, self._answer = self._answer, None
        answer.set_result((int(head[9:12]), body))

    def connection_lost(self, error: Exception | None) -> None:
        """It was closed, maybe in an answer."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(str(error)))

    def close(self) -> None:
        """Closes it."""
        self._transport.close()


def dechunked(data: bytes) -> bytes:
    """The body of an answer in chunks."""
    body = b""
    while data:
        size, data = data.split(b"\r\n", 1)
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return body


class Http:
    """Clients that share an event loop; requests are made before the clock starts, answers are not unpacked."""

    def __init__(self, spec: dict[str, Any], queries: Floats) -> None:
        self._spec, self._queries = spec, queries
        self._host, self._port = spec["host"], spec["port"]
        self._made: dict[tuple[int, int], list[bytes]] = {}

    def rows(self, count: int, parameter: int) -> Rows:
        """The answers to the first `count` queries."""

        async def ask() -> Rows:
            connection = await self._connection()
            found = []
            for request in self._requests(1, parameter)[:count]:
                status, body = await connection.ask(request)
                if status not in (200, 201):
                    raise RuntimeError(f"HTTP {status}: {body[:300]!r}")
                found.append(self._rows(body))
            connection.close()
            return found

        rows: Rows = run(ask())
        return rows

    def load(self, clients: int, seconds: float, batch: int, parameter: int) -> dict[str, float]:
        """As many clients as told, each with one request after another."""
        requests = self._requests(batch, parameter)
        took: list[float] = []
        failed = 0

        async def client(number: int, connection: Connection, until: float) -> None:
            nonlocal failed
            i = number * 7
            while (begin := time.perf_counter()) < until:
                i += 1
                try:
                    status, _ = await connection.ask(requests[i % len(requests)])
                except ConnectionError:
                    failed += 1
                    return
                if status in (200, 201):
                    took.append(time.perf_counter() - begin)
                else:
                    failed += 1

        async def all_of_them() -> tuple[float, float]:
            connections = await asyncio.gather(*(self._connection() for _ in range(clients)))
            for connection in connections:
                await connection.ask(requests[0])
            begin, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(client(i, each, begin + seconds) for i, each in enumerate(connections)))
            wall = time.perf_counter() - begin, time.process_time() - cpu
            for connection in connections:
                connection.close()
            return wall

        wall, cpu = run(all_of_them())
        return figures(took, batch, wall, cpu, failed)

    async def _connection(self) -> Connection:
        _, found = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return found

    def _requests(self, batch: int, parameter: int) -> list[bytes]:
        key = batch, parameter
        if key not in self._made:
            starts = range(0, len(self._queries) - batch + 1, batch)
            bodies = [self._body(self._queries[i : i + batch], parameter) for i in starts]
            head = (
                f"POST {self._spec['path']} HTTP/1.1\r\nHost: {self._host}\r\n"
                f"Content-Type: {self._spec.get('type', 'application/json')}\r\nContent-Length: "
            )
            self._made[key] = [head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body for body in bodies]
        return self._made[key]

    def _body(self, queries: Floats, parameter: int) -> bytes:
        kind = self._spec["kind"]
        if kind == "chroma":
            body = {"query_embeddings": queries.tolist(), "n_results": 10, "include": ["distances"]}
            return json.dumps(body, separators=(",", ":")).encode()
        if kind == "text":
            words = self._spec["texts"]
            return json.dumps({"text": words[int(abs(queries[0, 0]) * 1e6) % len(words)], "k": 10}).encode()
        fields = {"model": self._spec["model"], "k": 10, "effort": {self._spec["effort"]: parameter}}
        if kind == "arrow":
            import pyarrow as pa

            from rayemb.serve.batch import write_stream

            column = pa.FixedSizeListArray.from_arrays(pa.array(queries.ravel()), queries.shape[1])
            return write_stream(pa.record_batch([column], names=["vectors"]), fields)
        import orjson

        return orjson.dumps({**fields, "vectors": queries}, option=orjson.OPT_SERIALIZE_NUMPY)

    def _rows(self, body: bytes) -> list[int]:
        if self._spec["kind"] == "arrow":
            import pyarrow as pa

            ids = pa.ipc.open_stream(body).read_all().column("ids")[0].as_py()
        else:
            ids = json.loads(body)["ids"][0]
        return [int(each) for each in ids]


# -- over gRPC ---------------------------------------------------------------------------------------------------


class Grpc(Http):
    """Clients that share an event loop, each with a connection of its own; messages are made before the clock starts,
    answers are not unpacked.
    """

    async def _connection(self) -> Any:
        import grpc

        # Channels of the same options share a connection unless they are told not to.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        channel = grpc.aio.insecure_channel(f"{self._host}:{self._spec['grpc']}", options)
        return Called(channel, f"/rayemb.v1.Search/{self._spec['path']}", self._spec.get("application", ""))

    def _requests(self, batch: int, parameter: int) -> list[bytes]:
        key = batch, parameter
        if key not in self._made:
            starts = range(0, len(self._queries) - batch + 1, batch)
            self._made[key] = [self._body(self._queries[i : i + batch], parameter) for i in starts]
        return self._made[key]

    def _body(self, queries: Floats, parameter: int) -> bytes:
        from rayemb.serve.rpc import messages

        if self._spec["kind"] == "grpc-text":
            words = self._spec["texts"]
            text = words[int(abs(queries[0, 0]) * 1e6) % len(words)]
            return bytes(messages.SearchRequest(text=text, k=10).SerializeToString())
        request = messages.SearchBatchRequest(
            vectors=messages.floats(queries),
            dim=queries.shape[1],
            model=self._spec["model"],
            k=10,
            effort={self._spec["effort"]: parameter},
        )
        return bytes(request.SerializeToString())

    def _rows(self, body: bytes) -> list[int]:
        from rayemb.serve.rpc import messages

        return [int(each) for each in messages.SearchBatchResponse.FromString(body).ids]


class Called:
    """A channel, asked as a `Connection` is."""

    def __init__(self, channel: Any, method: str, application: str) -> None:
        self._channel, self._method = channel, channel.unary_unary(method)
        # Where Serve has several applications, which.
        self._metadata = [("application", application)] if application else []

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """200 and the message, or 500 and why."""
        import grpc

        try:
            return 200, await self._method(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            return 500, f"{error.code()}: {error.details()}".encode()

    def close(self) -> None:
        """Closes it, some time."""
        self._closing = asyncio.get_running_loop().create_task(self._channel.close())


def run(work: Any) -> Any:
    """What a coroutine gives, on the quickest loop there is."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


# -- the process -------------------------------------------------------------------------------------------------


def answer_commands(generator: Threads | Http) -> None:
    """Does what the lines on standard input say, until they end."""
    for line in sys.stdin:
        told = json.loads(line)
        what = told.pop("do")
        found: Any
        try:
            found = generator.rows(**told) if what == "rows" else generator.load(**told)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        say(found)


def keep_output() -> None:
    """Makes standard output that of `say` alone; what others print goes to the log."""
    global _out
    _out = os.dup(1)
    os.dup2(2, 1)


def say(what: Any) -> None:
    """One line of JSON to whoever started this process."""
    os.write(_out, json.dumps(what).encode() + b"\n")


_out = 1


def main() -> None:
    """The generator of a service that speaks HTTP."""
    keep_output()
    spec = json.loads(sys.argv[1])
    kind = Grpc if spec["kind"].startswith("grpc") else Http
    generator = kind(spec, np.load(spec["queries"]))
    say({"ready": True})
    answer_commands(generator)


if __name__ == "__main__":
    main()
