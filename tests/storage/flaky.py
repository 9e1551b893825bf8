"""An S3 server with bad days: it stands before a real one, answers errors or falls silent, then passes requests on."""

import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>'
_HOP = ("connection", "transfer-encoding", "content-length", "server", "date")


class FlakyServer(ThreadingHTTPServer):
    """Forwards to `endpoint`. `fail` makes the next `times` requests whose path holds a word end badly."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = endpoint
        self.seen: Counter[str] = Counter()  # requests by method
        self.times: list[float] = []  # when each request that failed came
        self._failures: list[tuple[str, int | None, float]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, word: str, *, times: int, status: int | None = None, silence_s: float = 0.0) -> None:
        """`status`: what is answered; None: nothing, after `silence_s` the connection closes."""
        with self._lock:
            self._failures += [(word, status, silence_s)] * times

    def next_failure(self, path: str) -> tuple[int | None, float] | None:
        with self._lock:
            for number, (word, status, silence) in enumerate(self._failures):
                if word in path:
                    del self._failures[number]
                    self.times.append(time.monotonic())
                    return status, silence
        return None

    def handle_error(self, *_: Any) -> None:
        """Clients that give up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen[self.command] += 1
        failure = self.server.next_failure(self.path)
        if failure is None:
            self._forward(body)
        elif failure[0] is None:
            time.sleep(failure[1])
            self.close_connection = True
        else:
            self._send(failure[0], {}, SLOW_DOWN)

    def _forward(self, body: bytes) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        url = f"{self.server.endpoint}{self.path}"
        request = urllib.request.Request(url, data=body or None, method=self.command, headers=headers)
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            data = answer.read()
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
            self._send(answer.status, kept, data, answer.headers.get("Content-Length"))

    def _send(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        head = self.command == "HEAD"
        self.send_header("Content-Length", (length or "0") if head else str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Quiet."""
