"""Objectives over (anchors, candidates, positives, ignored). Plain torch; knows no Ray.

Every loss takes a `Batch` of vectors and an exchange between ranks, and is exact at any world size. All of them go
through one engine, `rayemb.parallel.contrast`. A new loss is one file here, one test beside its siblings, and its
config's name in `AnyLoss` below.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rayemb.losses.base import Batch, Loss, Rows
from rayemb.losses.class_proxies import ClassProxies, ClassProxiesConfig
from rayemb.losses.cross_batch_memory import CrossBatchMemory, CrossBatchMemoryConfig
from rayemb.losses.debiased import Debiased, DebiasedConfig
from rayemb.losses.decoupled import Decoupled, DecoupledConfig
from rayemb.losses.focal import Focal, FocalConfig
from rayemb.losses.gist_embed import GISTEmbed, GISTEmbedConfig
from rayemb.losses.infonce import InfoNCE, InfoNCEConfig
from rayemb.losses.matryoshka import Matryoshka, MatryoshkaConfig
from rayemb.losses.nt_xent import NTXent, NTXentConfig
from rayemb.losses.progressive import Progressive, ProgressiveConfig
from rayemb.losses.rzenembed import RzenEmbed, RzenEmbedConfig
from rayemb.losses.siglip import SigLIP, SigLIPConfig
from rayemb.losses.starbucks import Starbucks, StarbucksConfig
from rayemb.losses.supcon import SupCon, SupConConfig


def _named(value: Any) -> Any:
    # A `loss:` block that only sets a temperature means the default loss.
    return {"name": "infonce", **value} if isinstance(value, dict) else value


AnyLoss = Annotated[
    InfoNCEConfig
    | SigLIPConfig
    | NTXentConfig
    | SupConConfig
    | DecoupledConfig
    | DebiasedConfig
    | GISTEmbedConfig
    | RzenEmbedConfig
    | ClassProxiesConfig
    | FocalConfig
    | ProgressiveConfig
    | MatryoshkaConfig
    | StarbucksConfig
    | CrossBatchMemoryConfig,
    Field(discriminator="name"),
    BeforeValidator(_named),
]

for _wrapper in (FocalConfig, ProgressiveConfig, MatryoshkaConfig, StarbucksConfig, CrossBatchMemoryConfig):
    _wrapper.model_rebuild(_types_namespace={"AnyLoss": AnyLoss})

__all__ = [
    "AnyLoss",
    "Batch",
    "ClassProxies",
    "ClassProxiesConfig",
    "CrossBatchMemory",
    "CrossBatchMemoryConfig",
    "Debiased",
    "DebiasedConfig",
    "Decoupled",
    "DecoupledConfig",
    "Focal",
    "FocalConfig",
    "GISTEmbed",
    "GISTEmbedConfig",
    "InfoNCE",
    "InfoNCEConfig",
    "Loss",
    "Matryoshka",
    "MatryoshkaConfig",
    "NTXent",
    "NTXentConfig",
    "Progressive",
    "ProgressiveConfig",
    "Rows",
    "RzenEmbed",
    "RzenEmbedConfig",
    "SigLIP",
    "SigLIPConfig",
    "Starbucks",
    "StarbucksConfig",
    "SupCon",
    "SupConConfig",
]
