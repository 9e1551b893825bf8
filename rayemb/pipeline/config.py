"""The config of a whole run: every room's own config under its room's name."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

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
from rayemb.train import SoupConfig, TrainConfig
from rayemb.tune import TuneConfig

ArtefactName = Literal[
    "corpus", "curated", "runs", "model", "soup", "embeddings", "index", "attributes", "report", "sweeps", "mined"
]
ReadName = Literal["corpus", "model", "embeddings", "index"]
_FOLDERS = {"embeddings": "embeddings.lance"}


class Artefacts(Config):
    """Where each artefact lies; default: a folder of its name in the workspace."""

    corpus: str | None = None
    curated: str | None = Field(None, description="the curated corpus; train on it by artefacts.corpus=...")
    runs: str | None = Field(None, description="checkpoints")
    model: str | None = None
    soup: str | None = Field(None, description="the mean of several models; use it by artefacts.model=...")
    embeddings: str | None = None
    index: str | None = None
    attributes: str | None = Field(None, description="clusters and neighbours of the corpus's rows, for samplers")
    report: str | None = None
    sweeps: str | None = Field(None, description="Tune results")
    mined: str | None = Field(None, description="the corpus with hard negatives; train on it by artefacts.corpus=...")


Section = dict[str, Any]  # what a step sets otherwise; checked when it is merged with the section of all steps


class StepConfig(Config):
    """One step of a recipe: a stage, what it reads of earlier steps, and what is set otherwise than for all steps.

    Mappings are merged key by key; one that chooses something else by its `name` or `kind` replaces the old one.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="the step's own; its artefacts lie in workspace/name"
    )
    run: str = Field(description="the stage, as corpus, train, embed, index, mine, soup or evaluate")
    reads: dict[ReadName, str] = Field(
        {}, description="artefact: the step that it is taken from; default: the last one before that made it"
    )
    init: str | None = Field(None, description="train: the step whose model the training starts from")
    models: list[str] | None = Field(None, description="soup: the steps whose models are averaged")
    corpus: Section = Field({})
    curate: Section = Field({})
    train: Section = Field({})
    soup: Section = Field({})
    evaluate: Section = Field({})
    embed: Section = Field({})
    index: Section = Field({})
    attributes: Section = Field({})
    mine: Section = Field({})
    tune: Section = Field({})


class RunConfig(Config):
    """One YAML for all stages; each stage reads its own section and passes artefacts on."""

    workspace: str = Field("rayemb-demo", description="folder or s3:// prefix that the artefacts lie in")
    artefacts: Artefacts = Artefacts()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    corpus: CorpusConfig = CorpusConfig()
    curate: CurateConfig = CurateConfig()
    train: TrainConfig = TrainConfig()
    soup: SoupConfig = SoupConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    embed: EmbedConfig = EmbedConfig()
    index: IndexConfig = IndexConfig()
    attributes: AttributesConfig = AttributesConfig()
    mine: MineConfig = MineConfig()
    serve: ServeConfig = ServeConfig()
    tune: TuneConfig = TuneConfig()
    steps: list[StepConfig] = Field([], description="`rayemb recipe` runs them in order; a single stage ignores them")

    @field_validator("workspace")
    @classmethod
    def _usable(cls, value: str) -> str:
        # Ray workers run in other folders, on other machines: a relative path would mean something else there.
        return normalise(value)

    @model_validator(mode="after")
    def _soup_is_judged(self) -> "RunConfig":
        measured, asked = self.train.evaluation.metrics, self.soup.method == "greedy" and self.soup.models
        if asked and self.soup.metric not in measured:
            raise ValueError(f"soup.metric: {self.soup.metric!r} is not measured; there are {', '.join(measured)}")
        return self

    def uri(self, artefact: ArtefactName) -> str:
        """Where `artefact` lies."""
        chosen = getattr(self.artefacts, artefact)
        return normalise(chosen) if chosen else join(self.workspace, _FOLDERS.get(artefact, artefact))
