"""A client of the service, with nothing but the standard library underneath."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb.serve.api import IndexInfo, SearchResponse
from rayemb.serve.errors import ServeError

_PARSERS: dict[str, Callable[[str], str | int | float | bool]] = {
    "integer": int,
    "number": float,
    "boolean": lambda text: {"true": True, "false": False}[text.lower()],
}


class Client:
    """Asks a running service.

    Args:
        url: where it answers, such as `http://127.0.0.1:8000`.
        timeout_s: how long to wait for an answer, in s.

    Every method raises ServeError with the server's own message, or if no server answers.
    """

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s

    def search(
        self,
        text: str | None = None,
        image: bytes | str | Path | None = None,
        k: int = 10,
        filter: Mapping[str, str | int | float | bool] | None = None,
    ) -> SearchResponse:
        """The k best items for a text, an image (encoded bytes, or the path of a file), or both."""
        body: dict[str, Any] = {"k": k}
        if text is not None:
            body["text"] = text
        if image is not None:
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
            body["image"] = base64.b64encode(data).decode()
        if filter is not None:
            body["filter"] = dict(filter)
        return SearchResponse.model_validate(self._json("/v1/search", body))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors `(n, D)` float32 of `texts`; at most `index().max_batch` of them."""
        body = {"input": list(texts), "encoding_format": "base64"}
        data = self._json("/v1/embeddings", body)["data"]
        ordered = sorted(data, key=lambda item: item["index"])
        rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in ordered]
        return np.stack(rows).astype(np.float32)

    def index(self) -> IndexInfo:
        """What is served."""
        return IndexInfo.model_validate(self._json("/v1/index"))

    def parse_filter(self, texts: Mapping[str, str]) -> dict[str, str | int | float | bool]:
        """A filter whose values have the types of the index's columns, from texts such as a command line has.

        Columns that the index lacks are passed on as they are: the server's answer names those that there are.
        Raises ServeError for a text that is not a value of its column's type.
        """
        types = self.index().payload_types
        chosen: dict[str, str | int | float | bool] = {}
        for column, text in texts.items():
            kind = types.get(column, "string")
            try:
                chosen[column] = _PARSERS.get(kind, str)(text)
            except (KeyError, ValueError) as error:
                raise ServeError(f"{text!r} is no {kind}", where=f"filter.{column}", field=column) from error
        return chosen

    def image(self, image_url: str) -> bytes:
        """The picture behind a hit's `image_url`."""
        return self._request(image_url)

    def _json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        return json.loads(self._request(path, data))

    def _request(self, path: str, data: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise _served(error, self.url + path) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ServeError(
                f"no answer ({reason})", where=self.url, fix="start the service with `rayemb serve`"
            ) from error


def _served(error: urllib.error.HTTPError, url: str) -> ServeError:
    text = error.read().decode("utf-8", "replace")
    try:
        told = json.loads(text)["error"]
        message = str(told["message"])
        field = told.get("field") or told.get("param") or ""
        name = told.get("request_id") or ""
    except (ValueError, KeyError, TypeError, AttributeError):
        # From a proxy in between rather than from the gateway.
        message, field, name = f"HTTP {error.code}: {text[:200]}", "", ""
    return ServeError(message, where=field or url, status=error.code, field=field, request_id=name)
