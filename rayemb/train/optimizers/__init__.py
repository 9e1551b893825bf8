"""Optimizers. Each is one file: a config that builds it; a new one adds its config's name to `AnyOptimizer`."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rayemb.train.optimizers.adamw import AdamWConfig
from rayemb.train.optimizers.base import OptimizerConfig
from rayemb.train.optimizers.lamb import LAMBConfig
from rayemb.train.optimizers.lars import LARSConfig
from rayemb.train.optimizers.muon import MuonConfig


def _named(value: Any) -> Any:
    # An `optimizer:` block that only sets a rate means the default optimizer.
    return {"name": "adamw", **value} if isinstance(value, dict) else value


AnyOptimizer = Annotated[
    AdamWConfig | LAMBConfig | LARSConfig | MuonConfig, Field(discriminator="name"), BeforeValidator(_named)
]

__all__ = ["AdamWConfig", "AnyOptimizer", "LAMBConfig", "LARSConfig", "MuonConfig", "OptimizerConfig"]
