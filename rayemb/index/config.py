"""The settings of an index: what to build, how wide to search, how good it has to be."""

from typing import Literal

from pydantic import Field, field_validator

from rayemb.config import Config
from rayemb.index.faiss_index import check_factory


class IndexConfig(Config):
    """How to build an index over an embeddings table, and what counts as good enough."""

    factory: str = Field("IVF64,Flat", description="FAISS factory string, such as Flat, IVF1024,PQ32 or HNSW32")
    metric: Literal["inner_product"] = Field("inner_product", description="inner product over unit vectors: cosine")
    shards: int = Field(2, ge=1, description="files of about equal rows, built and searched in parallel")
    nprobe: int = Field(16, ge=1, description="IVF lists a query looks into; more is slower and finds more")
    ef_search: int = Field(64, ge=1, description="candidates an HNSW search keeps; more is slower and finds more")
    train_rows: int = Field(50_000, ge=1, description="rows sampled to train the quantiser (held in memory once)")
    seed: int = Field(0, ge=0, lt=2**31, description="chooses the sample, the quantiser's start and the recall queries")
    recall_k: int = Field(10, ge=1, description="neighbours a query of the recall measurement asks for")
    recall_queries: int = Field(200, ge=0, description="rows used as queries to measure recall; 0 does not measure")
    min_recall: float = Field(0.9, ge=0, le=1, description="verification fails below this recall@recall_k")

    @field_validator("factory")
    @classmethod
    def _known_factory(cls, value: str) -> str:
        # Here rather than in the build: a typo should not cost the embedding of a corpus first.
        check_factory(value)
        return value
