"""A client of the service that waits for its answers."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayemb.serve.api import IndexInfo, SearchResponse
from rayemb.serve.client import calls
from rayemb.serve.client.calls import BatchHits, Call, Filter, FilterValue, Item

T = TypeVar("T")


class Client:
    """Asks a running service. Threads may share one; it keeps connections open until `close`.

    Args:
        url: where it answers, such as `http://127.0.0.1:8000`.
        timeout_s: how long a call may take with all its attempts, in s; the server is told, and gives up then too.
        key: the API key, if the service wants one.
        retries: how often a call is tried again that was refused for now (429, 502, 503) or got no answer; not before
            Retry-After.

    Every method raises ServeError with the server's own message, or if no server answers.
    """

    def __init__(self, url: str, timeout_s: float = 30.0, *, key: str | None = None, retries: int = 2) -> None:
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        # No proxies or passwords of the environment: a key goes to the server that was named and nowhere else.
        self._http = httpx.Client(headers=calls.authorization(key), trust_env=False)

    def search(
        self,
        text: str | None = None,
        image: bytes | str | Path | None = None,
        k: int = 10,
        filter: Filter | None = None,
        **more: Any,
    ) -> SearchResponse:
        """The k best items for a text, an image (encoded bytes, or the path of a file), or both.

        `more`: other fields of POST /v1/search, such as `recall`, `positive` or `group_by`.
        """
        return self._do(calls.search(text, image, k, filter, more))

    def search_batch(
        self,
        queries: Sequence[str] | ArrayLike,
        *,
        model: str | None = None,
        k: int = 10,
        filter: Filter | None = None,
        payload: bool = False,
        **more: Any,
    ) -> BatchHits:
        """The k best for each of several texts, or vectors `(N, D)` of the model with the digest `model`.

        `more`: other fields of POST /v1/search/batch, such as `recall`.
        """
        return self._do(calls.search_batch(queries, model, k, filter, payload, more))

    def embed(self, texts: Sequence[str], *, kind: Literal["query", "document"] = "query") -> NDArray[np.float32]:
        """Unit vectors `(n, D)` float32 of `texts`; at most `index().max_batch` of them.

        `kind`: whether they look or are to be found, for models that embed the two unlike.
        """
        return self._do(calls.embed(texts, kind))

    def index(self) -> IndexInfo:
        """What is served."""
        return self._do(calls.index())

    def collections(self) -> dict[str, Any]:
        """The catalog as it is served, with what is known of each version's quality; the JSON document."""
        return self._do(calls.collections())

    def parse_filter(self, texts: Mapping[str, str]) -> dict[str, FilterValue]:
        """A filter whose values have the types of the index's columns, from texts such as a command line has.

        Columns that the index lacks are passed on as they are: the server's answer names those that there are.
        Raises ServeError for a text that is not a value of its column's type.
        """
        return calls.parsed_filter(self.index().payload_types, texts)

    def image(self, image_url: str) -> bytes:
        """The picture behind a hit's `image_url`."""
        return self._do(calls.image(image_url))

    def upsert(self, items: Sequence[Item], *, model: str | None = None) -> int:
        """Puts items in, in place of those with their ids; `model`: the digest, where they have vectors."""
        return self._do(calls.upsert(items, model))

    def delete(self, ids: Sequence[str]) -> int:
        """Takes items out; the number of those that there were."""
        return self._do(calls.delete(ids))

    def get(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The payloads of items by their ids; without those that there are not."""
        return self._do(calls.get(ids))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: Call[T]) -> T:
        deadline, attempt, url = time.monotonic() + self.timeout_s, 0, self.url + call.path
        while True:
            left = max(0.001, deadline - time.monotonic())
            status, retry_after = 0, ""
            try:
                answer = self._http.request(
                    call.method, url, content=call.content, headers=call.headers(left), timeout=left
                )
                if answer.is_success:
                    return call.read(answer.content)
                status, retry_after = answer.status_code, answer.headers.get("retry-after", "")
                problem = calls.refusal(status, answer.content, url)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem = calls.unanswered(error, self.url)
            wait = calls.wait_before(attempt, self.retries, status, retry_after, deadline - time.monotonic())
            if wait is None:
                raise problem
            time.sleep(wait)
            attempt += 1
