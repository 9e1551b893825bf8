"""What is watched while serving, and what is too far."""

from pydantic import Field, field_validator

from rayemb.config import Config
from rayemb.storage import normalise


class WatchConfig(Config):
    """Samples of queries without a filter, at each gateway replica."""

    percent: float = Field(0.0, ge=0, le=100, description="queries that are asked again exactly, in percent; 0: none")
    k: int = Field(10, ge=1, description="recall@k of those that ask for as many hits or more")
    window: int = Field(200, ge=1, description="samples that the recall is the mean of, the latest")
    least_samples: int = Field(30, ge=1, description="samples before a low recall is an alert")
    min_recall: float = Field(0.9, ge=0, le=1, description="recall below which there is an alert")
    queue: int = Field(32, ge=1, description="samples that may wait; more are dropped")
    drift: bool = Field(False, description="whether the queries' vectors are compared with a reference")
    reference_queries: int = Field(1000, ge=100, description="the first queries that are the reference")
    drift_window: int = Field(500, ge=50, description="the latest queries that are compared with it")
    reference: str | None = Field(
        None, description="folder that keeps the reference, one for all replicas and restarts; null: in memory"
    )
    max_shift: float = Field(
        0.1, gt=0, description="squared distance of the means, over the reference's variance, that is an alert"
    )
    max_stability: float = Field(
        0.25, gt=0, description="population stability index that is an alert; 0.1 to 0.25 is a moderate change"
    )

    @field_validator("reference")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        return None if value is None else normalise(value)
