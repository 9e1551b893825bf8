"""Samplers: which rows of a corpus make up a global batch. Each is one file: a config that arranges windows."""

from typing import Annotated

from pydantic import Field

from rayemb.data.samplers.base import Arrangement, Sampler, Window
from rayemb.data.samplers.class_balanced import ClassBalancedConfig
from rayemb.data.samplers.cluster_stratified import ClusterStratifiedConfig
from rayemb.data.samplers.length_bucketed import LengthBucketedConfig
from rayemb.data.samplers.locality import LocalityConfig
from rayemb.data.samplers.shuffled import ShuffledConfig

AnySampler = Annotated[
    ShuffledConfig | ClusterStratifiedConfig | LocalityConfig | ClassBalancedConfig | LengthBucketedConfig,
    Field(discriminator="name"),
]

__all__ = [
    "AnySampler",
    "Arrangement",
    "ClassBalancedConfig",
    "ClusterStratifiedConfig",
    "LengthBucketedConfig",
    "LocalityConfig",
    "Sampler",
    "ShuffledConfig",
    "Window",
]
