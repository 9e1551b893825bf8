"""The kinds of tasks of a suite: one file each, told apart in YAML by `kind`."""

from typing import Annotated

from pydantic import Field

from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.classification import ClassificationConfig
from rayemb.evaluate.tasks.clustering import ClusteringConfig
from rayemb.evaluate.tasks.few_shot import FewShotConfig
from rayemb.evaluate.tasks.image_text import ImageTextConfig
from rayemb.evaluate.tasks.pair_classification import PairClassificationConfig
from rayemb.evaluate.tasks.reranking import RerankingConfig
from rayemb.evaluate.tasks.retrieval import RetrievalConfig
from rayemb.evaluate.tasks.sts import STSConfig
from rayemb.evaluate.tasks.zero_shot import ZeroShotConfig

AnyTask = Annotated[
    RetrievalConfig
    | RerankingConfig
    | STSConfig
    | ClassificationConfig
    | ClusteringConfig
    | PairClassificationConfig
    | ImageTextConfig
    | ZeroShotConfig
    | FewShotConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "AnyTask",
    "ClassificationConfig",
    "ClusteringConfig",
    "FewShotConfig",
    "Found",
    "ImageTextConfig",
    "Items",
    "Means",
    "PairClassificationConfig",
    "RerankingConfig",
    "RetrievalConfig",
    "STSConfig",
    "Shown",
    "Task",
    "TaskConfig",
    "ZeroShotConfig",
]
