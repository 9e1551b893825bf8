"""How wide a search looks: the settings of one call, never of the index that all calls share."""

from dataclasses import dataclass

from rayemb.index.errors import QueryError


@dataclass(frozen=True)
class Effort:
    """How wide a search looks. Each part matters to the types that have it; more is slower and finds more.

    Args:
        nprobe: IVF lists a query looks into.
        ef_search: candidates an HNSW graph search keeps.
        rerank: candidates per result that a refine stage (`,RFlat`, `,Refine(...)`) scores again.

    Raises QueryError for a part below one.
    """

    nprobe: int = 16
    ef_search: int = 64
    rerank: int = 4

    def __post_init__(self) -> None:
        for name, value in (("nprobe", self.nprobe), ("ef_search", self.ef_search), ("rerank", self.rerank)):
            if value < 1:
                raise QueryError(f"must be at least 1, got {value}", where=f"effort.{name}")
