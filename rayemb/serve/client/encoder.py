"""A running service as an encoder: what it serves is judged as its users meet it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayemb.serve.client.sync import Client
from rayemb.serve.errors import ServeError

CALLS_AT_ONCE = 4
"""One call at a time would wait for the network; the service batches what comes together."""


class EndpointEncoder:
    """The model behind POST /v1/embeddings, which takes texts alone (`rayemb.evaluate.encoders.Encoder`).

    Args:
        url: where the service answers.
        name: what a report calls it; default: its address.
        key: the API key, if the service wants one.
        timeout_s: of one call, in s.

    Opening asks what is served. Every method raises ServeError with the server's own message.
    """

    def __init__(self, url: str, *, name: str | None = None, key: str | None = None, timeout_s: float = 60.0) -> None:
        self._client = Client(url, timeout_s, key=key, retries=5)
        self._name = name or url.rstrip("/").split("://", 1)[-1]
        about = self._client.index()
        self._digest, self.dim, self._most = about.model_digest, about.dim, about.max_batch

    @property
    def name(self) -> str:
        """What a report calls it."""
        return self._name

    @property
    def digest(self) -> str:
        """Of the model that was served when this was opened."""
        return self._digest

    def texts(self, texts: Sequence[str], *, kind: Literal["query", "text"] = "text") -> NDArray[np.float32]:
        """Unit vectors `(N, D)`, as queries or as documents where the model tells them apart."""
        parts = [texts[at : at + self._most] for at in range(0, len(texts), self._most)]
        with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
            found = list(pool.map(lambda part: self._embed(part, kind), parts))
        return np.concatenate(found) if found else np.empty((0, self.dim), np.float32)

    def images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Raises ServeError: the service has no call for it."""
        raise ServeError(
            "the service embeds texts alone", where=self._client.url, fix="judge pictures with the model directory"
        )

    def close(self) -> None:
        """Closes the connections. Raises ServeError if another model is served by now: the figures are of no one."""
        try:
            digest = self._client.index().model_digest
        finally:
            self._client.close()
        if digest != self._digest:
            raise ServeError(
                f"the model changed during the evaluation, from {self._digest[:12]} to {digest[:12]}",
                where=self._client.url,
                fix="evaluate again",
            )

    def _embed(self, texts: Sequence[str], kind: Literal["query", "text"]) -> NDArray[np.float32]:
        return self._client.embed(texts, kind="document" if kind == "text" else "query")
