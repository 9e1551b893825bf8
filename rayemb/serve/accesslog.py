"""One line of JSON a request: who asked what and what became of it, never what was asked for."""

import logging
import sys
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path

import orjson

from rayemb.serve.errors import ServeError

STDOUT = "-"


class AccessLog:
    """Writes to a file, opened again when it was moved away (logrotate), or to standard output (`-`).

    Raises ServeError if the file cannot be opened. A line that cannot be written, on a full disk say, ends no request.
    """

    def __init__(self, target: str) -> None:
        handler: logging.Handler
        if target == STDOUT:
            handler = logging.StreamHandler(sys.stdout)
        else:
            try:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                handler = WatchedFileHandler(target, encoding="utf-8")
            except OSError as error:
                raise ServeError(f"cannot write {target} ({error.strerror})", where="serve.access_log") from error
        handler.setFormatter(logging.Formatter("%(message)s"))
        # Not by name: two gateways in one process would write each other's lines.
        self._log = logging.Logger("rayemb.access")
        self._log.addHandler(handler)

    def write(
        self, *, request_id: str, key: str, method: str, route: str, status: int, ms: float, read: int, sent: int
    ) -> None:
        """The line of one request; `route` is the template, since a path has ids; status 0: the client left."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "key": key,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(ms, 3),
            "bytes_in": read,
            "bytes_out": sent,
        }
        self._log.info(orjson.dumps(line).decode())
