"""Configs of the data room."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayemb.config import Config
from rayemb.data.sources import AnySource, DemoSource
from rayemb.models import ImageLimits

EmbedWhat = Literal["image", "text", "query"]


class CorpusConfig(Config):
    """How a corpus is built: where its pairs come from and what is acceptable."""

    source: AnySource = Field(default_factory=DemoSource, description="where the pairs come from")
    seed: int = Field(0, ge=0, description="decides the split and the order of the rows")
    test_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of concepts kept as zero_shot (sources without splits)"
    )
    val_fraction: float = Field(0.03, ge=0, lt=1, description="share of concepts kept as val (sources without splits)")
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="the build fails if more rows than this are set aside"
    )
    max_text_chars: int = Field(2000, ge=1, description="longer texts are set aside")
    image_limits: ImageLimits = ImageLimits()
    row_group_rows: int = Field(64, ge=1, description="rows per Parquet row group: the grain of shuffling")
    shard_rows: int = Field(8192, ge=1, description="a shard ends after this many rows")
    shard_mb: float = Field(64, gt=0, description="... or after this many MiB, whichever comes first")

    @field_validator("source", mode="before")
    @classmethod
    def _default_source(cls, value: object) -> object:
        # So that `corpus.source.limit=1000` alone means the source that one gets when saying nothing.
        return {"name": "demo", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _fractions(self) -> "CorpusConfig":
        if self.test_fraction + self.val_fraction >= 1:
            raise ValueError("test_fraction + val_fraction must be below 1")
        return self


class EmbedConfig(Config):
    """How a corpus is turned into an embeddings table."""

    what: EmbedWhat | None = Field(None, description="what of a row; default: the image if there is one, else the text")
    splits: list[str] | None = Field(None, description="splits to embed; default: all")
    batch_size: int = Field(256, ge=1, description="rows per call of the encoder")
    workers: int = Field(2, ge=1, description="encoders at work at once")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs of each encoder: threads that decode and compute")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each encoder takes")
    rows_per_file: int = Field(
        4096, ge=1, description="rows per Lance data file, about: the shard that an interrupted run goes on from"
    )
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="the job fails if more rows than this cannot be read, decoded or encoded"
    )
    keep_images: bool = Field(True, description="keep the encoded image in the table, for showing it")
