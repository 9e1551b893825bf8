"""Which trials go on: all of them, ASHA, HyperBand (BOHB's too), population-based training.

Time is a report's `budget`: reports so far of the training's steps, or, where the share of the data is the fidelity,
that share over the least one. Every scheduler compares trials at equal budgets.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from rayemb.config import Config
from rayemb.train import TrainConfig
from rayemb.tune.errors import TuneError
from rayemb.tune.space import CHOICES, Space

BUDGET = "budget"
# What another value of can be trained on with: nothing of it is part of a checkpoint's state or of the data's plan.
_CHANGEABLE = ("loss.", "schedule.", "augment.", "optimizer.learning_rate", "gradient_clipping", "ema.decay")


class SchedulerConfig(Config, ABC):
    """Base of the configs of schedulers."""

    @property
    def pauses(self) -> bool:
        """Whether trials wait for others in the middle."""
        return False

    @abstractmethod
    def build(self, metric: str, mode: str, budget: int, space: Space, *, bohb: bool = False) -> TrialScheduler:
        """The scheduler; `budget`: of a whole trial."""


class NoneConfig(SchedulerConfig):
    """Every trial is trained to its end."""

    name: Literal["none"] = "none"

    def build(self, metric: str, mode: str, budget: int, space: Space, *, bohb: bool = False) -> TrialScheduler:
        """See `SchedulerConfig.build`."""
        return FIFOScheduler()


class ASHAConfig(SchedulerConfig):
    """ASHA (Li et al., MLSys 2020): of the trials at a rung one in so many goes on to the next; nobody waits."""

    name: Literal["asha"] = "asha"
    grace: int = Field(1, ge=1, description="reports before a trial may be stopped")
    reduction_factor: int = Field(2, ge=2, description="one in so many trials goes on at each rung")

    def build(self, metric: str, mode: str, budget: int, space: Space, *, bohb: bool = False) -> TrialScheduler:
        """See `SchedulerConfig.build`."""
        return AsyncHyperBandScheduler(
            time_attr=BUDGET,
            metric=metric,
            mode=mode,
            max_t=budget,
            grace_period=min(self.grace, budget),
            reduction_factor=self.reduction_factor,
        )


class HyperBandConfig(SchedulerConfig):
    """HyperBand (Li et al., JMLR 2018): brackets of more trials at smaller budgets; trials of a bracket are compared
    when all have come so far, and the better ones go on from their checkpoints.
    """

    name: Literal["hyperband"] = "hyperband"
    reduction_factor: int = Field(3, ge=2, description="one in so many trials goes on at each rung")

    @property
    def pauses(self) -> bool:
        """See `SchedulerConfig.pauses`."""
        return True

    def build(self, metric: str, mode: str, budget: int, space: Space, *, bohb: bool = False) -> TrialScheduler:
        """See `SchedulerConfig.build`."""
        kind = HyperBandOfBOHB if bohb else HyperBand
        return kind(time_attr=BUDGET, metric=metric, mode=mode, max_t=budget, reduction_factor=self.reduction_factor)


class PBTConfig(SchedulerConfig):
    """Population-based training (Jaderberg et al., 2017): all trials are one population; every `interval` reports the
    worst take over the weights of the best and go on with perturbed settings. What comes of it is a schedule of
    settings, which the sweep's record has.
    """

    name: Literal["pbt"] = "pbt"
    interval: int = Field(1, ge=1, description="reports between exploits; each interval costs a start of the workers")
    quantile: float = Field(0.25, gt=0, le=0.5, description="share of the trials that is replaced by the best ones")
    resample: float = Field(0.25, ge=0, le=1, description="how often a setting is drawn anew and not perturbed")
    factors: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.8, 1.2), description="what a setting is multiplied by"
    )
    synchronous: bool = Field(True, description="compare trials when all have come so far")

    @property
    def pauses(self) -> bool:
        """See `SchedulerConfig.pauses`."""
        return True

    @model_validator(mode="after")
    def _perturbs(self) -> "PBTConfig":
        if self.factors[0] == self.factors[1] == 1.0:
            raise ValueError("factors of 1 perturb nothing")
        return self

    def check(self, space: Space, corners: list[TrainConfig]) -> None:
        """Raises TuneError for a parameter that a training cannot go on with another value of."""
        for parameter in space.parameters:
            key, where = parameter.key, f"tune.search.{parameter.name}"
            fix = f"search what a training can change on its way ({', '.join(_CHANGEABLE)}), or use another scheduler"
            structural = parameter.needs or any(o.constants is not None for o in parameter.distribution.options)
            if structural or not key.startswith(_CHANGEABLE) or key.endswith((".name", ".kind")):
                raise TuneError(
                    "population-based training changes settings in mid-training, and not this", where=where, fix=fix
                )
            if key.endswith(".temperature") and any(_learned(config, key) for config in corners):
                raise TuneError(
                    "the temperature is learned, and a checkpoint brings its own: a new start of it changes nothing",
                    where=where,
                    fix=f"give train.{key.removesuffix('temperature')}learnable_temperature=false",
                )

    def build(self, metric: str, mode: str, budget: int, space: Space, *, bohb: bool = False) -> TrialScheduler:
        """See `SchedulerConfig.build`."""
        mutations: dict[str, Any] = {}
        for parameter in space.parameters:
            distribution = parameter.distribution
            labels = [option.label for option in distribution.options]
            mutations[parameter.name] = labels if distribution.kind in CHOICES else distribution.domain()
        return Population(
            time_attr=BUDGET,
            metric=metric,
            mode=mode,
            perturbation_interval=self.interval,
            hyperparam_mutations=mutations,
            quantile_fraction=self.quantile,
            resample_probability=self.resample,
            perturbation_factors=self.factors,
            custom_explore_fn=Within(space),
            synch=self.synchronous,
        )


class _Unfinished:
    """A sweep that goes on gives its scheduler finished trials, too: a bracket would wait for them for ever."""

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Takes a trial that may still report."""
        if not trial.is_finished():
            super().on_trial_add(tune_controller, trial)  # type: ignore[misc]


class HyperBand(_Unfinished, HyperBandScheduler):  # type: ignore[misc]
    """Ray's, which goes on where a sweep was interrupted."""


class HyperBandOfBOHB(_Unfinished, HyperBandForBOHB):  # type: ignore[misc]
    """Ray's for BOHB, likewise."""


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Ray's, which goes on where a sweep was interrupted.

    Ray keeps nothing of a scheduler: it would compare trials at the first interval again, of which all have had more,
    and none would ever be run. Here they are compared when all have come one interval further than the furthest was.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Takes a new trial, or one of the sweep that was interrupted."""
        super().on_trial_add(tune_controller, trial)
        if not trial.is_finished():
            furthest = trial.last_result.get(self._time_attr, 0)
            after: float = furthest + self._perturbation_interval
            self._next_perturbation_sync: float = max(self._next_perturbation_sync, after)


class Within:
    """Keeps perturbed settings within their ranges: Ray multiplies them whatever comes of it."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def __call__(self, draw: dict[str, Any]) -> dict[str, Any]:
        """The draw with each number within its bounds."""
        ranges = {p.name: p.distribution for p in self.space.parameters if p.distribution.kind not in CHOICES}
        return {name: ranges[name].value(value) if name in ranges else value for name, value in draw.items()}


def _learned(config: TrainConfig, key: str) -> bool:
    node: Any = config
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, dict) else getattr(node, part, None)
    return bool(getattr(node, "learnable_temperature", False))


AnyScheduler = Annotated[NoneConfig | ASHAConfig | HyperBandConfig | PBTConfig, Field(discriminator="name")]
