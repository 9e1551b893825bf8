"""Config of a sweep."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rayemb.config import Config
from rayemb.tune.measures import AnyMeasure
from rayemb.tune.schedulers import AnyScheduler, ASHAConfig, HyperBandConfig, PBTConfig
from rayemb.tune.search import AnySearcher, BOHBConfig, GridConfig, RandomConfig
from rayemb.tune.space import Space, parse_space

# What every training reports beside its evaluations.
REPORTED = ("loss", "pairs_per_second", "pairs_per_second_overall", "tokens_per_second", "gradient_norm", "temperature")
SEARCH_TRIALS = 10


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Fidelity(Config):
    """What a trial gets more of when it goes on."""

    name: Literal["steps", "fraction"] = Field(
        "steps",
        description="steps: one training, compared on its way; fraction: a training of its own on each share of the "
        "data, with as many steps less",
    )
    least: float = Field(0.25, gt=0, lt=1, description="fraction: the smallest share of what a trial is trained on")


class TuneConfig(Config):
    """A sweep over the training config."""

    search: dict[str, Any] = Field(
        {"loss.temperature": "loguniform(0.02, 0.5)", "loss.margin": "uniform(0.0, 0.2)"},
        min_length=1,
        description="key of the training config → distribution of Ray Tune, as text, or {choice: [...]}, whose options "
        "may be mappings with further distributions in them",
    )
    set: dict[str, Any] = Field(
        {}, description="keys of the training config that every trial changes, to be cheap; best.yaml has them not"
    )
    objectives: dict[str, Literal["max", "min"]] = Field(
        {"val/recall@1": "max"},
        min_length=1,
        description="what trials are compared by, and whether more or less of it is better; the first one that is "
        "reported while training decides who goes on",
    )
    measures: list[Annotated[AnyMeasure, BeforeValidator(_named)]] = Field(
        [], description="what is measured of each trial's model at its end"
    )
    watch: tuple[str, ...] = Field(
        (), description="further metrics that the page draws over each setting, beside the objectives"
    )
    searcher: Annotated[AnySearcher, BeforeValidator(_named)] = Field(
        default_factory=RandomConfig, description="how settings are chosen"
    )
    scheduler: Annotated[AnyScheduler, BeforeValidator(_named)] = Field(
        default_factory=ASHAConfig, description="which trials go on"
    )
    fidelity: Annotated[Fidelity, BeforeValidator(_named)] = Field(
        default_factory=Fidelity, description="what a trial that goes on gets more of"
    )
    trials: int | None = Field(None, ge=1, description="how many; null: 10, or all of a grid")
    concurrent: int = Field(2, ge=1, description="trials at once, at most; see cluster.trial_slots")
    report_every: int | None = Field(
        None, ge=1, description="steps between a trial's evaluations, reports and checkpoints; null: evaluation.every"
    )
    retries: int = Field(1, ge=0, description="how often a trial that failed is started again, from its checkpoint")
    minutes: float | None = Field(
        None, gt=0, description="the sweep ends after so long, with what it has found; run again to go on"
    )
    keep_models: Literal["all", "best"] = Field("all", description="whose models are kept when the sweep is done")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the sweep's folder; null: one that its config, corpus and search decide",
    )
    seed: int = Field(0, ge=0, description="decides the samples")

    @field_validator("search")
    @classmethod
    def _distributions(cls, search: dict[str, Any]) -> dict[str, Any]:
        parse_space(search)
        return search

    @model_validator(mode="after")
    def _agree(self) -> "TuneConfig":
        bohb = isinstance(self.searcher, BOHBConfig)
        if bohb and not isinstance(self.scheduler, HyperBandConfig):
            raise ValueError(f"searcher bohb learns from hyperband's rungs; scheduler is {self.scheduler.name}")
        if isinstance(self.scheduler, PBTConfig) and not isinstance(self.searcher, RandomConfig):
            raise ValueError(f"scheduler pbt draws its first settings at random; searcher is {self.searcher.name}")
        if self.fidelity.name == "fraction" and not isinstance(self.scheduler, ASHAConfig | HyperBandConfig):
            raise ValueError(
                f"fidelity fraction is for the schedulers asha and hyperband; scheduler is {self.scheduler.name}"
            )
        return self

    @property
    def space(self) -> Space:
        """The search space."""
        return parse_space(self.search)

    @property
    def total(self) -> int:
        """How many trials there are."""
        if isinstance(self.searcher, GridConfig):
            points = len(self.space.points())
            return min(points, self.trials or points)
        return self.trials or SEARCH_TRIALS

    @property
    def measured(self) -> list[str]:
        """Names of what is only known of a finished trial."""
        return [metric for measure in self.measures for metric in measure.metrics]
