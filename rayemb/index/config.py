"""The settings of an index: what to build, how wide to search, how good it has to be."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rayemb.config import Config
from rayemb.index.effort import Effort
from rayemb.index.faiss_index import check_factory, has_lists

AUTO = "auto"


class PlanConfig(Config):
    """What an index may cost and has to reach, for `rayemb index plan` and `factory: auto`."""

    memory_mb: float | None = Field(
        None, gt=0, description="of all shards, without the vectors of a refine stage, which stay on disk"
    )
    latency_ms: float | None = Field(None, gt=0, description="a query alone on one thread; null: no limit")
    recall: float = Field(0.95, gt=0, le=1, description="recall@recall_k that has to be reached")
    sample_rows: int = Field(20_000, ge=1_000, description="rows that the candidates are built of and measured on")


class MapConfig(Config):
    """The map of an index in the plane, for the web page: `rayemb index map`."""

    method: Literal["umap", "pca"] = Field(
        "umap", description="umap keeps neighbours together (extra `map`); pca: the two first principal components"
    )
    rows: int = Field(5_000, ge=1, le=50_000, description="points at most: rows sampled from the index")
    neighbours: int = Field(15, ge=2, description="umap: nearest rows that a row is laid out by")
    seed: int = Field(0, ge=0, lt=2**31, description="chooses the sample and the layout")


class IndexConfig(Config):
    """How to build an index over an embeddings table, and what counts as good enough."""

    factory: str = Field(
        "IVF64,Flat",
        description="FAISS factory string, such as Flat, IVF1024,PQ32x4fs,Refine(SQfp16) or HNSW32; "
        "auto: what `rayemb index plan` chooses by the settings under plan",
    )
    prefix: int | None = Field(
        None, ge=1, description="search by this many first coordinates, re-rank by all (Matryoshka; needs ,Refine(...))"
    )
    metric: Literal["inner_product"] = Field("inner_product", description="inner product over unit vectors: cosine")
    shards: int = Field(2, ge=1, description="files, built and searched in parallel")
    by: Literal["rows", "hash", "cell"] = Field(
        "rows",
        description="rows: in the table's order; hash: by id; cell: IVF lists side by side, so a query asks few shards",
    )
    words: str | None = Field(
        None, description="payload column of texts whose words are indexed too (BM25), for hybrid queries; null: none"
    )
    nprobe: int = Field(16, ge=1, description="IVF lists a query looks into; more is slower and finds more")
    ef_search: int = Field(64, ge=1, description="candidates an HNSW search keeps; more is slower and finds more")
    rerank: int = Field(4, ge=1, description="candidates per result that a refine stage scores again")
    train_rows: int = Field(50_000, ge=1, description="rows sampled to train the quantiser (held in memory once)")
    seed: int = Field(0, ge=0, lt=2**31, description="chooses the sample, the quantiser's start and the recall queries")
    recall_k: int = Field(10, ge=1, description="neighbours a query of the recall measurement asks for")
    recall_queries: int = Field(200, ge=0, description="held-out rows to measure recall with; 0 does not measure")
    min_recall: float = Field(0.9, ge=0, le=1, description="verification fails below this recall@recall_k")
    plan: PlanConfig = PlanConfig()
    map: MapConfig = MapConfig()

    @field_validator("factory")
    @classmethod
    def _known_factory(cls, value: str) -> str:
        # Here rather than in the build: a typo should not cost the embedding of a corpus first.
        if value != AUTO:
            check_factory(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.factory == AUTO and self.prefix is not None:
            raise ValueError("prefix needs a factory of its own: auto plans none")
        if self.by == "cell" and self.factory != AUTO and not has_lists(self.factory):
            raise ValueError(f"by: cell needs an IVF factory, whose lists are the cells, and {self.factory} has none")
        return self

    @property
    def effort(self) -> Effort:
        """How wide the index searches unless asked otherwise."""
        return Effort(self.nprobe, self.ef_search, self.rerank)
