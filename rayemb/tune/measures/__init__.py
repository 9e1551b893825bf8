"""What is measured of a trial's model at its end, one file a measure."""

from typing import Annotated

from pydantic import Field

from rayemb.tune.measures.base import Measure, Trained
from rayemb.tune.measures.diagnostics import Diagnostics
from rayemb.tune.measures.latency import Latency
from rayemb.tune.measures.size import Size

AnyMeasure = Annotated[Size | Latency | Diagnostics, Field(discriminator="name")]

__all__ = ["AnyMeasure", "Diagnostics", "Latency", "Measure", "Size", "Trained"]
