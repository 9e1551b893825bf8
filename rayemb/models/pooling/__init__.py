"""Poolings: one vector of a text from the states of its tokens."""

from typing import Annotated

from pydantic import Field

from rayemb.models.pooling.attention import (
    AttentionPoolingConfig,
    LatentAttentionPoolingConfig,
    MultiLayerPoolingConfig,
)
from rayemb.models.pooling.base import Pooling, PoolingConfig
from rayemb.models.pooling.plain import ClsPoolingConfig, LastPoolingConfig, MeanPoolingConfig

AnyPooling = Annotated[
    MeanPoolingConfig
    | ClsPoolingConfig
    | LastPoolingConfig
    | AttentionPoolingConfig
    | LatentAttentionPoolingConfig
    | MultiLayerPoolingConfig,
    Field(discriminator="name"),
]

__all__ = [
    "AnyPooling",
    "AttentionPoolingConfig",
    "ClsPoolingConfig",
    "LastPoolingConfig",
    "LatentAttentionPoolingConfig",
    "MeanPoolingConfig",
    "MultiLayerPoolingConfig",
    "Pooling",
    "PoolingConfig",
]
