"""The config of a whole run: every room's own config under its room's name."""

from typing import Literal

from pydantic import Field, field_validator

from rayemb import storage
from rayemb.cluster import ClusterConfig
from rayemb.config import Config
from rayemb.data import CorpusConfig, EmbedConfig
from rayemb.evaluate import EvaluateConfig
from rayemb.index import IndexConfig
from rayemb.serve import ServeConfig
from rayemb.train import TrainConfig
from rayemb.tune import TuneConfig

ArtefactName = Literal["corpus", "runs", "model", "embeddings", "index", "report", "sweeps"]
_FOLDERS = {"embeddings": "embeddings.lance"}


class Artefacts(Config):
    """Where each artefact lies; default: a folder of its name in the workspace."""

    corpus: str | None = None
    runs: str | None = Field(None, description="checkpoints")
    model: str | None = None
    embeddings: str | None = None
    index: str | None = None
    report: str | None = None
    sweeps: str | None = Field(None, description="Tune results")


class RunConfig(Config):
    """One YAML for all stages; each stage reads its own section and passes artefacts on."""

    workspace: str = Field("rayemb-demo", description="folder or s3:// prefix that the artefacts lie in")
    artefacts: Artefacts = Artefacts()
    cluster: ClusterConfig = ClusterConfig()
    corpus: CorpusConfig = CorpusConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    embed: EmbedConfig = EmbedConfig()
    index: IndexConfig = IndexConfig()
    serve: ServeConfig = ServeConfig()
    tune: TuneConfig = TuneConfig()

    @field_validator("workspace")
    @classmethod
    def _usable(cls, value: str) -> str:
        # Ray workers run in other folders, on other machines: a relative path would mean something else there.
        return storage.normalise(value)

    def uri(self, artefact: ArtefactName) -> str:
        """Where `artefact` lies."""
        chosen = getattr(self.artefacts, artefact)
        return storage.normalise(chosen) if chosen else storage.join(self.workspace, _FOLDERS.get(artefact, artefact))
