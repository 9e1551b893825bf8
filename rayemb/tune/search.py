"""How the next trial's settings are chosen: at random, a whole grid, TPE on Optuna, BOHB.

Each is a `Searcher` of Ray Tune's over the same parameters, those inside options included.
"""

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rayemb.config import Config
from rayemb.tune.errors import TuneError
from rayemb.tune.space import CHOICES, Draw, Space, plain

if TYPE_CHECKING:
    import optuna

Objectives = Mapping[str, Literal["max", "min"]]
FINISHED = "finished"  # a trial's last report has it


class SearcherConfig(Config, ABC):
    """Base of the configs of searchers."""

    @abstractmethod
    def check(self, space: Space, objectives: Objectives) -> None:
        """Raises TuneError for a space that it cannot search, or a package that is not installed."""

    @abstractmethod
    def build(self, space: Space, objectives: Objectives, seed: int) -> Searcher:
        """The searcher."""


class RandomConfig(SearcherConfig):
    """Independent draws (Bergstra and Bengio, JMLR 2012); keys written as grid_search are walked through in turn."""

    name: Literal["random"] = "random"

    def check(self, space: Space, objectives: Objectives) -> None:
        """See `SearcherConfig.check`."""

    def build(self, space: Space, objectives: Objectives, seed: int) -> Searcher:
        """See `SearcherConfig.build`."""
        return Draws(space, seed)


class GridConfig(SearcherConfig):
    """Every combination of choices, once."""

    name: Literal["grid"] = "grid"

    def check(self, space: Space, objectives: Objectives) -> None:
        """See `SearcherConfig.check`."""
        for parameter in space.parameters:
            if parameter.distribution.kind not in CHOICES:
                raise TuneError(
                    f"a grid is of choices, and this is {parameter.distribution}",
                    where=f"tune.search.{parameter.name}",
                    fix="write grid_search([...]), or use tune.searcher=random",
                )

    def build(self, space: Space, objectives: Objectives, seed: int) -> Searcher:
        """See `SearcherConfig.build`."""
        return Draws(space, seed, space.points())


class TPEConfig(SearcherConfig):
    """The tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) on Optuna, for one objective or several."""

    name: Literal["tpe"] = "tpe"
    startup_trials: int = Field(5, ge=1, description="random ones before it begins to model")

    def check(self, space: Space, objectives: Objectives) -> None:
        """See `SearcherConfig.check`."""
        _require("optuna", "optuna", self.name)
        _refuse(space, ("randn", "grid_search"), self.name)

    def build(self, space: Space, objectives: Objectives, seed: int) -> Searcher:
        """See `SearcherConfig.build`."""
        return TPE(space, objectives, seed, self.startup_trials)


class BOHBConfig(SearcherConfig):
    """BOHB (Falkner et al., ICML 2018): a kernel density model of what did well at each budget; with hyperband.

    Its model draws from numpy's global generator: two sweeps with one seed begin alike and may part.
    """

    name: Literal["bohb"] = "bohb"

    def check(self, space: Space, objectives: Objectives) -> None:
        """See `SearcherConfig.check`."""
        _require("hpbandster", "bohb", self.name)
        _require("ConfigSpace", "bohb", self.name)
        _refuse(space, ("randn", "grid_search"), self.name)
        if len(objectives) > 1:
            raise TuneError(
                f"bohb has one objective, and there are {len(objectives)}",
                where="tune.objectives",
                fix="use tune.searcher=tpe",
            )

    def build(self, space: Space, objectives: Objectives, seed: int) -> Searcher:
        """See `SearcherConfig.build`."""
        # Here, since hpbandster and what it brings take a second to import, and every command reads this file.
        from rayemb.tune.bohb import BOHB, config_space

        ((metric, mode),) = objectives.items()
        return BOHB(space=config_space(space, seed), metric=metric, mode=mode)


AnySearcher = Annotated[RandomConfig | GridConfig | TPEConfig | BOHBConfig, Field(discriminator="name")]


class Draws(Searcher):  # type: ignore[misc]
    """Draw `i` is a function of the seed and of `i` alone: the same after a restore, and however trials overlap.

    With `points`, those, and then no more.
    """

    def __init__(self, space: Space, seed: int, points: list[dict[str, str]] | None = None) -> None:
        super().__init__()
        self.space, self.seed, self.points = space, seed, points
        self.count = 0
        self._grid = space.grid()

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next draw."""
        number, self.count = self.count, self.count + 1
        if self.points is not None:
            return dict(self.points[number]) if number < len(self.points) else Searcher.FINISHED
        rng = np.random.default_rng([self.seed, number])
        draw = {p.name: plain(p.distribution.domain().sample(random_state=rng)) for p in self.space.parameters}
        return self._pruned({**draw, **self._grid[number % len(self._grid)]})

    def _pruned(self, draw: Draw) -> dict[str, Any]:
        return {parameter.name: draw[parameter.name] for parameter in self.space.active(draw)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing is learned from it."""

    def save(self, checkpoint_path: str) -> None:
        """Writes how many were drawn."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            json.dump({"count": self.count}, file)

    def restore(self, checkpoint_path: str) -> None:
        """Goes on after as many."""
        with open(checkpoint_path, encoding="utf-8") as file:
            self.count = json.load(file)["count"]


class TPE(OptunaSearch):  # type: ignore[misc]
    """Optuna's TPE over a conditional space.

    A trial that a scheduler stopped is told as pruned, with its reports: its last value is that of a shorter training
    and must not pass for the result of a whole one. Of several objectives Optuna knows no pruning: such a trial is
    told as failed there.
    """

    def __init__(self, space: Space, objectives: Objectives, seed: int, startup_trials: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(n_startup_trials=startup_trials, seed=seed)
        metrics, modes = list(objectives), list(objectives.values())
        several = len(metrics) > 1
        self._steps: dict[str, set[int]] = {}
        super().__init__(
            space=Suggestions(space),
            metric=metrics if several else metrics[0],
            mode=modes if several else modes[0],
            sampler=sampler,
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Takes a report, once for each step; a trial that goes on from a checkpoint comes by the same ones again."""
        step, seen = int(result.get("step", 0)), self._steps.setdefault(trial_id, set())
        if isinstance(self.metric, list) or result.get(self.metric) is None or step in seen:
            return
        seen.add(step)
        self._ot_trials[trial_id].report(float(result[self.metric]), step)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells what came of it."""
        from optuna.trial import TrialState

        if trial_id in self._completed_trials:
            return
        metrics = self.metric if isinstance(self.metric, list) else [self.metric]
        values = [(result or {}).get(metric) for metric in metrics]
        finished = bool((result or {}).get(FINISHED)) and not error and all(value is not None for value in values)
        state = TrialState.COMPLETE if finished else TrialState.PRUNED
        if not finished and (error or len(metrics) > 1 or not self._steps.get(trial_id)):
            state = TrialState.FAIL
        self._ot_study.tell(self._ot_trials[trial_id], values if finished else None, state=state)
        self._completed_trials.add(trial_id)


class Suggestions:
    """The space as Optuna asks for it; it can be pickled with the study."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def __call__(self, trial: "optuna.Trial") -> None:
        """Suggests a value of each parameter that the choices so far leave in play."""
        draw: dict[str, Any] = {}
        for parameter in self.space.parameters:
            if not all(draw.get(name) == label for name, label in parameter.needs):
                continue
            name, distribution = parameter.name, parameter.distribution
            if distribution.kind in CHOICES:
                draw[name] = trial.suggest_categorical(name, [option.label for option in distribution.options])
                continue
            assert distribution.bounds is not None
            low, high = distribution.bounds
            if distribution.whole:
                draw[name] = trial.suggest_int(name, int(low), int(high), log=distribution.logarithmic)
            else:
                # Optuna has no step in the logarithm; `Distribution.value` rounds.
                draw[name] = trial.suggest_float(name, low, high, log=distribution.logarithmic)


def _require(package: str, extra: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise TuneError(
            f"the searcher {name} needs the package {package}",
            where="tune.searcher",
            fix=f"pip install 'rayemb[{extra}]', or use tune.searcher=random",
        )


def _refuse(space: Space, kinds: tuple[str, ...], name: str) -> None:
    for parameter in space.parameters:
        if parameter.distribution.kind in kinds:
            raise TuneError(
                f"the searcher {name} cannot search {parameter.distribution}",
                where=f"tune.search.{parameter.name}",
                fix="use uniform, loguniform, randint or choice there, or tune.searcher=random",
            )
