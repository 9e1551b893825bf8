"""The search space of a sweep, in YAML: `loss.temperature: loguniform(0.01, 0.5)`."""

import ast
from typing import Any

from pydantic import Field, field_validator

from rayemb.config import Config

# Name → number of arguments. The names and their meaning are Ray Tune's own (`ray.tune.uniform`, ...).
DISTRIBUTIONS = {
    "uniform": 2,
    "loguniform": 2,
    "quniform": 3,
    "qloguniform": 3,
    "randint": 2,
    "lograndint": 2,
    "randn": 2,
    "choice": 1,
    "grid_search": 1,
}


class TuneConfig(Config):
    """A sweep over the training config, with early stopping by ASHA (Li et al., 2020)."""

    search: dict[str, str] = Field(
        {"loss.temperature": "loguniform(0.02, 0.5)", "loss.margin": "uniform(0.0, 0.2)"},
        min_length=1,
        description="key of the training config → distribution of Ray Tune",
    )
    set: dict[str, Any] = Field(
        {
            "steps": 60,
            "batch_size": 128,
            "corpora.main.fraction": 0.25,
            "workers": 1,
            "evaluation.every": 20,
            "logging.every": 20,
        },
        description="keys of the training config that every trial changes, to be cheap",
    )
    metric: str = Field("val/recall@1", description="what a trial reports and the sweep compares")
    mode: str = Field("max", pattern="^(min|max)$", description="whether more or less of it is better")
    trials: int = Field(4, ge=1, description="samples of the search space")
    concurrent: int = Field(2, ge=1, description="trials at once, at most; see cluster.trial_slots")
    grace_steps: int = Field(20, ge=1, description="steps before a trial may be stopped")
    reduction_factor: int = Field(2, ge=2, description="of ASHA: one in so many trials goes on at each rung")
    seed: int = Field(0, ge=0, description="decides the samples")

    @field_validator("search")
    @classmethod
    def _distributions(cls, search: dict[str, str]) -> dict[str, str]:
        for key, text in search.items():
            try:
                parse_distribution(text)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        return search


def parse_distribution(text: str) -> tuple[str, list[Any]]:
    """`("loguniform", [0.01, 0.5])` of `loguniform(0.01, 0.5)`; literals only, nothing is evaluated.

    Raises ValueError saying what is wrong.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not a distribution such as uniform(0, 1)") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise ValueError(f"{text!r} is not a distribution such as uniform(0, 1)")
    name = call.func.id
    if name not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {name!r}; known: {', '.join(DISTRIBUTIONS)}")
    try:
        arguments = [ast.literal_eval(argument) for argument in call.args]
    except ValueError as error:
        raise ValueError(f"the arguments of {text!r} must be plain values") from error
    if len(arguments) != DISTRIBUTIONS[name]:
        raise ValueError(f"{name} takes {DISTRIBUTIONS[name]} arguments, got {len(arguments)}")
    if DISTRIBUTIONS[name] == 1 and not isinstance(arguments[0], list | tuple):
        raise ValueError(f"{name} takes a list")
    if name in ("uniform", "loguniform", "randint", "lograndint") and not arguments[0] < arguments[1]:
        raise ValueError(f"the lower end of {text!r} is not below the upper")
    return name, arguments
