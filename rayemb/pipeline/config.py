"""The config of a whole run: every room's own config under its room's name."""

from typing import Literal

from pydantic import Field, field_validator

from rayemb.cluster import ClusterConfig
from rayemb.config import Config
from rayemb.curate.config import CurateConfig
from rayemb.data import CorpusConfig, EmbedConfig
from rayemb.evaluate import EvaluateConfig
from rayemb.index import IndexConfig
from rayemb.index.attributes import AttributesConfig
from rayemb.mining import MineConfig
from rayemb.serve import ServeConfig
from rayemb.storage import StorageConfig, join, normalise
from rayemb.train import TrainConfig
from rayemb.tune import TuneConfig

ArtefactName = Literal[
    "corpus", "curated", "runs", "model", "embeddings", "index", "attributes", "report", "sweeps", "mined"
]
_FOLDERS = {"embeddings": "embeddings.lance"}


class Artefacts(Config):
    """Where each artefact lies; default: a folder of its name in the workspace."""

    corpus: str | None = None
    curated: str | None = Field(None, description="the curated corpus; train on it by artefacts.corpus=...")
    runs: str | None = Field(None, description="checkpoints")
    model: str | None = None
    embeddings: str | None = None
    index: str | None = None
    attributes: str | None = Field(None, description="clusters and neighbours of the corpus's rows, for samplers")
    report: str | None = None
    sweeps: str | None = Field(None, description="Tune results")
    mined: str | None = Field(None, description="the corpus with hard negatives; train on it by artefacts.corpus=...")


class RunConfig(Config):
    """One YAML for all stages; each stage reads its own section and passes artefacts on."""

    workspace: str = Field("rayemb-demo", description="folder or s3:// prefix that the artefacts lie in")
    artefacts: Artefacts = Artefacts()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    corpus: CorpusConfig = CorpusConfig()
    curate: CurateConfig = CurateConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    embed: EmbedConfig = EmbedConfig()
    index: IndexConfig = IndexConfig()
    attributes: AttributesConfig = AttributesConfig()
    mine: MineConfig = MineConfig()
    serve: ServeConfig = ServeConfig()
    tune: TuneConfig = TuneConfig()

    @field_validator("workspace")
    @classmethod
    def _usable(cls, value: str) -> str:
        # Ray workers run in other folders, on other machines: a relative path would mean something else there.
        return normalise(value)

    def uri(self, artefact: ArtefactName) -> str:
        """Where `artefact` lies."""
        chosen = getattr(self.artefacts, artefact)
        return normalise(chosen) if chosen else join(self.workspace, _FOLDERS.get(artefact, artefact))
