"""The model of a service: concurrent queries share passes through it."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rayemb.data.config import EmbedWhat
from rayemb.models import PADDING, Model
from rayemb.serve.coalesce import Coalescer
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Vectors

# Characters whose tokens are counted on the event loop: in less time than a thread takes to begin.
_COUNTED_HERE = 2_000


def use_threads(count: int) -> None:
    """Sets how many threads torch, FAISS and numpy use for work started in this thread: replicas share a machine."""
    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    threadpool_limits(count, user_api="blas")  # of the whole process: numpy scores the rows that pass a filter


class Encoder:
    """A model whose concurrent queries share passes through it; in the local engine and in the embedder.

    Not `serve.batch`: that waits for a timeout where this batches what came during the last pass, so that a
    lone query is not delayed; and it works outside a replica too.
    """

    def __init__(self, model: Model, config: ServeConfig, pool: ThreadPoolExecutor, *, searched: EmbedWhat) -> None:
        """`searched`: what the index is of; images are searched with the texts that describe them."""
        self._model, self._limits, self._pool = model, config.image, pool

        def texts(kind: Literal["query", "text"]) -> Coalescer[tuple[str, int], Vectors]:
            work = partial(self._embed_texts, kind)
            return Coalescer(
                work, config.max_batch, pool, max_cells=config.max_batch_tokens, weigh=lambda item: item[1]
            )

        self._texts = texts("text" if searched == "image" else "query")
        self._documents = texts("query" if searched == "query" else "text")
        self._images = Coalescer(self._embed_pixels, config.max_batch, pool)

    async def texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)`, and the number of tokens that the model read."""
        tokens = await self._counted(texts)
        return np.stack(await self._texts(list(zip(texts, tokens, strict=True)))), sum(tokens)

    async def documents(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` of texts that are to be found, and the number of tokens that the model read."""
        tokens = await self._counted(texts)
        return np.stack(await self._documents(list(zip(texts, tokens, strict=True)))), sum(tokens)

    async def images(self, images: Sequence[bytes]) -> Vectors:
        """Unit vectors `(n, D)`. Decoding fails (ImageError) for the one request, not for its batch."""
        loop = asyncio.get_running_loop()
        pixels = await asyncio.gather(
            *(loop.run_in_executor(self._pool, self._model.pixels, image, self._limits) for image in images)
        )
        return np.stack(await self._images(pixels))

    async def _counted(self, texts: Sequence[str]) -> list[int]:
        if sum(map(len, texts)) <= _COUNTED_HERE:
            return self._count(texts)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._count, texts)

    def _count(self, texts: Sequence[str]) -> list[int]:
        counts: list[int] = (self._model.tokenizer(texts) != PADDING).sum(axis=1).tolist()
        return counts

    def _embed_texts(self, kind: Literal["query", "text"], texts: list[tuple[str, int]]) -> list[Vectors]:
        return list(self._model.embed_texts([text for text, _ in texts], kind=kind))

    def _embed_pixels(self, pixels: list[NDArray[np.uint8]]) -> list[Vectors]:
        return list(self._model.embed_pixels(np.stack(pixels)))
