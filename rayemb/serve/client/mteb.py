"""A running service as a model of mteb (extra `mteb`): its tasks of retrieval search the served collection."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson

from rayemb.evaluate.mteb import MtebEncoder
from rayemb.serve.client import calls
from rayemb.serve.client.calls import BatchHits, Item
from rayemb.serve.client.encoder import CALLS_AT_ONCE, EndpointEncoder
from rayemb.serve.client.stores import endpoint, remove_passing
from rayemb.serve.client.sync import Client
from rayemb.serve.errors import ServeError


class MtebService(MtebEncoder):
    """The service by mteb's `SearchProtocol`, and by its `EncoderProtocol` for tasks that have nothing to search.

    Args:
        url: where the service answers.
        write: put the documents of a task into the collection (which is to be empty, and served with
            `serve.live=true`), and take them out again. The service searches what was written exactly until it is
            compacted. False: the collection holds the task's very documents already, under their ids: then what is
            judged is the index.
        emptied: take whatever the collection holds out first; without it, items that are no documents of a task are
            an error and stay.
        effort: how wide a search looks (`effort` of POST /v1/search); None: as the index does by itself.
        name, key, timeout_s, facts: see `EndpointEncoder` and `MtebEncoder`.

    Candidates of reranking tasks are ranked by the vectors of the service: there is no index to ask.
    Every method raises ServeError with the server's own message.
    """

    def __init__(
        self,
        url: str,
        *,
        write: bool = True,
        emptied: bool = False,
        effort: Mapping[str, int] | None = None,
        name: str | None = None,
        key: str | None = None,
        timeout_s: float = 60.0,
        **facts: Any,
    ) -> None:
        self._client = Client(url, timeout_s, key=key, retries=5)
        self._about = self._client.index()
        how: dict[str, Any] = {"searched": "written" if write else f"index {self._about.index_version[:12]}"}
        # Beside the name and the digest: figures of a search are no figures of the vectors.
        facts = {"framework": ["API"], "experiment_kwargs": {**how, **(effort or {})}, **facts}
        super().__init__(EndpointEncoder(url, name=name, key=key, timeout_s=timeout_s), **facts)
        self._write = write
        self._more: dict[str, Any] = {"effort": dict(effort)} if effort else {}
        self._corpus: Any = None
        self._known: set[str] = set()
        self._there = False  # whether the collection holds the corpus
        if write and emptied:
            remove_passing(self._client, None)

    def index(self, corpus: Any, **_: Any) -> None:
        """Takes note of the documents; they are written when something is to be searched among them."""
        self._clear()
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Any = None,
        num_proc: int | None = None,
        **more: Any,
    ) -> dict[str, dict[str, float]]:
        """The `top_k` documents of each query and their scores, by ids; with `top_ranked`, of those alone."""
        if self._corpus is None:
            raise ServeError("there are no documents", where="search", fix="call index first")
        if top_ranked is not None:
            from mteb.models import SearchEncoderWrapper

            vectors = SearchEncoderWrapper(self)
            more |= {"task_metadata": task_metadata, "num_proc": num_proc}
            vectors.index(self._corpus, **more)
            found: dict[str, dict[str, float]] = vectors.search(queries, top_k=top_k, top_ranked=top_ranked, **more)
            return found
        k = min(top_k, len(self._corpus))
        if k > self._about.max_k:
            raise ServeError(
                f"{task_metadata.name} looks at {k:,} documents of a query, and a search gives {self._about.max_k:,}",
                where=self._client.url,
                fix=f"serve with serve.max_k={k}",
            )
        self._fill(task_metadata, num_proc)
        ids, texts = self._rows(queries, "query", task_metadata, num_proc)
        lists: dict[str, dict[str, float]] = {}
        with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
            for part in pool.map(lambda texts: self._search(texts, k), self._parts(texts)):
                for hits, scores in zip(part.ids, part.scores, strict=True):
                    lists[ids[len(lists)]] = dict(zip(hits, scores.tolist(), strict=True))
        for query, found_there in lists.items():
            if strange := found_there.keys() - self._known:
                raise ServeError(
                    f"query {query!r} finds {min(strange)!r}, which is no document of {task_metadata.name}",
                    where=self._client.url,
                    fix="serve a collection that holds the documents of the task and nothing else",
                )
        return lists

    def close(self) -> None:
        """Takes out what was written, and closes the connections; see `EndpointEncoder.close`."""
        try:
            self._clear()
        finally:
            self._client.close()
            super().close()

    def _search(self, texts: Sequence[str], k: int) -> BatchHits:
        found = self._client.search_batch(texts, k=k, **self._more)
        if found.partial:
            raise ServeError("shards are missing, and what they have with them", where=", ".join(found.missing_shards))
        return found

    def _fill(self, task_metadata: Any, num_proc: int | None) -> None:
        if self._there:
            return
        ids, texts = self._rows(self._corpus, "document", task_metadata, num_proc)
        self._known, rows = set(ids), self._client.index().rows
        if len(self._known) < len(ids):
            twice = next(name for name, count in Counter(ids).items() if count > 1)
            raise ServeError(f"two documents have the id {twice!r}", where=task_metadata.name)
        expected = 0 if self._write else len(ids)
        if rows != expected:
            raise ServeError(
                f"the collection holds {rows:,} items, not {expected:,}",
                where=self._client.url,
                fix="serve an empty one, or say emptied=True" if self._write else "serve the documents of the task",
            )
        if self._write:
            self._there = True  # from the first of them on there is something to take out
            for part in self._parts(list(zip(ids, texts, strict=True))):
                self._more["at_least"] = self._written([Item(name, text=text) for name, text in part])
        self._there = True

    def _written(self, items: Sequence[Item]) -> int:
        """The version that a search has to see: another replica may answer it."""
        with endpoint():
            return self._client._do(replace(calls.upsert(items, None), read=_version))

    def _clear(self) -> None:
        if self._there and self._write:
            for part in self._parts(sorted(self._known)):
                self._client.delete(part)
        self._corpus, self._known, self._there = None, set(), False
        self._more.pop("at_least", None)

    def _rows(self, rows: Any, kind: str, task_metadata: Any, num_proc: int | None) -> tuple[list[str], list[str]]:
        """Ids, and texts as mteb puts them together for an encoder."""
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        loader = create_dataloader(
            rows, task_metadata=task_metadata, prompt_type=PromptType(kind), batch_size=256, num_proc=num_proc
        )
        ids: list[str] = []
        texts: list[str] = []
        for batch in loader:
            ids += batch["id"]
            texts += batch["text"]
        for name, text in zip(ids, texts, strict=True):
            if len(text) > self._about.max_text_chars:
                raise ServeError(
                    f"{kind} {name!r} has {len(text):,} characters, over {self._about.max_text_chars:,}",
                    where=task_metadata.name,
                    fix="serve with a larger serve.max_text_chars",
                )
        return ids, texts

    def _parts(self, rows: Sequence[Any]) -> Iterable[Any]:
        return (rows[at : at + self._about.max_batch] for at in range(0, len(rows), self._about.max_batch))


def _version(data: bytes) -> int:
    return int(orjson.loads(data)["version"])
