"""Ray Tune's BOHB over a conditional space."""

from typing import Any

import ConfigSpace as cs  # noqa: N813
from ray.tune.search.bohb import TuneBOHB

from rayemb.tune.space import CHOICES, Space, plain


class BOHB(TuneBOHB):  # type: ignore[misc]
    """Ray's BOHB, with what ConfigSpace gives as plain values."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next draw."""
        found = super().suggest(trial_id)
        return {name: plain(value) for name, value in found.items()} if found else found

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Takes a report; one without the objective says nothing."""
        if result.get(self.metric) is not None and trial_id in self.trial_to_params:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Forgets the trial."""
        if trial_id in self.trial_to_params:
            super().on_trial_complete(trial_id, result, error)


def config_space(space: Space, seed: int) -> Any:
    """The space as ConfigSpace has it, with its conditions."""
    made: dict[str, Any] = {}
    found = cs.ConfigurationSpace(seed=seed)
    for parameter in space.parameters:
        name, distribution = parameter.name, parameter.distribution
        if distribution.kind in CHOICES:
            made[name] = cs.CategoricalHyperparameter(name, [option.label for option in distribution.options])
        else:
            assert distribution.bounds is not None
            low, high = distribution.bounds
            kind = cs.UniformIntegerHyperparameter if distribution.whole else cs.UniformFloatHyperparameter
            made[name] = kind(name, lower=low, upper=high, log=distribution.logarithmic)
        found.add(made[name])
        conditions = [cs.EqualsCondition(made[name], made[parent], label) for parent, label in parameter.needs]
        # The innermost is enough: where a choice is not active, nothing that needs it is.
        if conditions:
            found.add(conditions[-1])
    return found
