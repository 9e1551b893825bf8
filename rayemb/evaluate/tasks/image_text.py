"""Image–text retrieval on a split of a corpus: any-hit recall, one direction a task (Radford et al., 2021)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayemb.data import Corpus
from rayemb.evaluate.captions import Captioned
from rayemb.evaluate.encoders import Encoder
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.exact_ranks import exact_ranks
from rayemb.evaluate.metrics import hits_at, reciprocal_ranks
from rayemb.evaluate.report import Curve, Example
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.labelled import first_rows
from rayemb.evaluate.tasks.vectors import diagnose, image_vectors, text_vectors


class ImageTextConfig(TaskConfig):
    """Pictures and captions of a split; relevant is all of the query's concept, and ties count against the model."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "pairs", "labels"})
    kind: Literal["image_text"] = "image_text"
    corpus: str = Field(description="a corpus of pairs of images and texts")
    split: str = Field("zero_shot", description="its split")
    search: Literal["text→image", "image→text"] = Field("text→image", description="what looks for what")
    ks: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="cut-offs of recall@k; the first is the main one")
    max_rows: int = Field(5000, ge=2, description="pairs, at most: the first of the split")

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return (*(f"recall@{k}" for k in self.ks), "mrr")

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return self.search

    def load(self, where: str) -> "ImageText":
        """See `TaskConfig.load`. Raises CorpusError without the split, EvaluateError without pictures."""
        corpus = Corpus.open(self.corpus)
        if corpus.kind != "image_text":
            raise EvaluateError(f"the corpus is of kind {corpus.kind}, not image_text", where=f"{where}: {corpus.uri}")
        rows = first_rows(corpus, self.split, ["id", "text", "image", "concept"], self.max_rows)
        for row in rows:
            if not row["image"] or not row["text"].strip():
                raise EvaluateError(
                    f"row {row['id']} has no {'text' if row['image'] else 'image'}",
                    where=f"{corpus.uri} ({self.split})",
                )
        if len({row["concept"] for row in rows}) < 2:
            raise EvaluateError("all pairs are of one concept", where=f"{corpus.uri} ({self.split})")
        return ImageText(self, where, corpus.digest, Captioned.of(rows))


@dataclass(frozen=True)
class ImageText(Task):
    """O(N T D) time, memory O((N + T) D) and a block."""

    config: ImageTextConfig
    where: str
    digest: str
    pairs: Captioned

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config, pairs = self.config, self.pairs
        names = [f"row {row['id']}" for row in pairs.rows]
        images = image_vectors(encoder, [row["image"] for row in pairs.rows], self.where, names)
        texts = text_vectors(encoder, pairs.captions, self.where)
        sides = (texts, images), (pairs.text_groups, pairs.image_groups)
        (queries, candidates), (groups_q, groups_c) = (
            sides
            if config.search == "text→image"
            else (
                sides[0][::-1],
                sides[1][::-1],
            )
        )
        ranks = exact_ranks(queries, candidates, groups_q, groups_c, tasks=means.ray_tasks)
        columns = {f"recall@{k}": hits_at(ranks, k) for k in config.ks} | {"mrr": reciprocal_ranks(ranks)}
        ids = [row["id"] for row in pairs.rows] if config.search == "image→text" else pairs.captions
        captions = {text: row for row, text in reversed(list(enumerate(pairs.captions)))}
        own = np.array([captions[row["text"]] for row in pairs.rows])
        ks = tuple(k for k in shown.KS if k <= len(candidates))
        curve = Curve(metric="recall", ks=ks, systems={encoder.name: tuple(float((ranks <= k).mean()) for k in ks)})
        return Found(
            # Queries of one concept succeed or fail together.
            Items(ids, columns, groups_q),
            len(candidates),
            self._shown(images, texts, queries, ranks, curve, means) if means.show else Shown(curves=(curve,)),
            diagnose(config.diagnosed, seed=means.seed, vectors=images, labels=pairs.image_groups, pairs=texts[own]),
        )

    def _shown(
        self,
        images: NDArray[np.float32],
        texts: NDArray[np.float32],
        queries: NDArray[np.float32],
        ranks: NDArray[np.int64],
        curve: Curve,
        means: Means,
    ) -> Shown:
        pairs = self.pairs
        rows = np.arange(min(len(images), shown.SAMPLE))
        products = images[rows] @ texts.T
        same = pairs.image_groups[rows, None] == pairs.text_groups[None, :]
        return Shown(
            space=shown.space(
                images,
                means.map,
                means.seed,
                labels=[row["concept"] for row in pairs.rows],
                texts=[row["text"] for row in pairs.rows],
                images=[row["image"] for row in pairs.rows],
            ),
            similarities=shown.similarities(products[same], products[~same]),
            curves=(curve,),
            examples=tuple(
                self._example(row, int(ranks[row]), queries, images, texts)
                for row in shown.worst(reciprocal_ranks(ranks))
            ),
        )

    def _example(
        self,
        row: int,
        rank: int,
        queries: NDArray[np.float32],
        images: NDArray[np.float32],
        texts: NDArray[np.float32],
    ) -> Example:
        pairs = self.pairs
        if self.config.search == "text→image":
            hits = pairs.hits(queries[row], int(pairs.text_groups[row]), images, shown.HITS)
            text = shown.short(pairs.captions[row])
            return Example(split=self.where, direction=self.config.search, text=text, rank=rank, hits=hits)
        scores = texts @ queries[row]
        good = pairs.text_groups == pairs.image_groups[row]
        best = np.argsort(-scores, kind="stable")[: shown.HITS]
        found = [(pairs.captions[n], float(scores[n]), bool(good[n])) for n in best]
        query = pairs.rows[row]
        return shown.text_example(self.where, self.config.search, query["text"], found, rank=rank, image=query["image"])
