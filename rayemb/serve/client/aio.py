"""A client of the service for asyncio."""

import asyncio
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


class AsyncClient:
    """Asks a running service without blocking the event loop. Tasks of one loop may share one, until `close`.

    Arguments and errors are those of `Client`.
    """

    def __init__(self, url: str, timeout_s: float = 30.0, *, key: str | None = None, retries: int = 2) -> None:
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        # No proxies or passwords of the environment: a key goes to the server that was named and nowhere else.
        self._http = httpx.AsyncClient(headers=calls.authorization(key), trust_env=False)

    async def search(
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
        return await self._do(calls.search(text, image, k, filter, more))

    async def search_batch(
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
        return await self._do(calls.search_batch(queries, model, k, filter, payload, more))

    async def embed(self, texts: Sequence[str], *, kind: Literal["query", "document"] = "query") -> NDArray[np.float32]:
        """Unit vectors `(n, D)` float32 of `texts`; at most `index().max_batch` of them.

        `kind`: whether they look or are to be found, for models that embed the two unlike.
        """
        return await self._do(calls.embed(texts, kind))

    async def index(self) -> IndexInfo:
        """What is served."""
        return await self._do(calls.index())

    async def collections(self) -> dict[str, Any]:
        """The catalog as it is served, with what is known of each version's quality; the JSON document."""
        return await self._do(calls.collections())

    async def parse_filter(self, texts: Mapping[str, str]) -> dict[str, FilterValue]:
        """A filter whose values have the types of the index's columns, from texts such as a command line has.

        Columns that the index lacks are passed on as they are: the server's answer names those that there are.
        Raises ServeError for a text that is not a value of its column's type.
        """
        return calls.parsed_filter((await self.index()).payload_types, texts)

    async def image(self, image_url: str) -> bytes:
        """The picture behind a hit's `image_url`."""
        return await self._do(calls.image(image_url))

    async def upsert(self, items: Sequence[Item], *, model: str | None = None) -> int:
        """Puts items in, in place of those with their ids; `model`: the digest, where they have vectors."""
        return await self._do(calls.upsert(items, model))

    async def delete(self, ids: Sequence[str]) -> int:
        """Takes items out; the number of those that there were."""
        return await self._do(calls.delete(ids))

    async def get(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The payloads of items by their ids; without those that there are not."""
        return await self._do(calls.get(ids))

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: Call[T]) -> T:
        deadline, attempt, url = time.monotonic() + self.timeout_s, 0, self.url + call.path
        while True:
            left = max(0.001, deadline - time.monotonic())
            status, retry_after = 0, ""
            try:
                answer = await self._http.request(
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
            await asyncio.sleep(wait)
            attempt += 1
