"""Config of the curation room."""

from pydantic import Field

from rayemb.config import Config
from rayemb.curate import AnyStep


class CurateConfig(Config):
    """What becomes of a corpus: steps, one after the other. Each sees what the one before it left."""

    steps: list[AnyStep] = Field(default_factory=list, description="filters and repairs in order, each with its name")
    seed: int = Field(0, ge=0, description="decides what a step draws at random, and the examples of the report")
    examples: int = Field(6, ge=0, description="examples of each reason in the report")
