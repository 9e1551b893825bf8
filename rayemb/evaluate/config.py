"""Config of an evaluation."""

from typing import Annotated

from pydantic import AfterValidator, Field

from rayemb.config import Config
from rayemb.evaluate.metrics.zero_shot import template_problem


def _with_a_name(templates: tuple[str, ...]) -> tuple[str, ...]:
    if problem := template_problem(templates):
        raise ValueError(problem)
    return templates


Templates = Annotated[tuple[str, ...], AfterValidator(_with_a_name)]
"""Sentences with {} for the name of a class."""


class EvaluateConfig(Config):
    """Which splits are judged and how sure the figures have to be."""

    splits: list[str] = Field(
        ["zero_shot", "style_held_out", "zero_shot_style"],
        min_length=1,
        description="splits to judge; those that the corpus lacks are left out, with a note in the report",
    )
    max_rows: int = Field(5000, ge=2, description="pairs per split, at most")
    ks: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="cut-offs of recall@k")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    samples: int = Field(2000, ge=100, description="bootstrap samples, by concept")
    seed: int = Field(0, ge=0, description="bootstrap, and which examples are shown")
    examples: int = Field(6, ge=0, description="example queries of each kind on the page")
    example_hits: int = Field(8, ge=1, description="retrieved images per example")
    workers: int = Field(2, ge=1, description="encoders at work at once")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each encoder takes")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each encoder takes")
