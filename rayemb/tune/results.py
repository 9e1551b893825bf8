"""A sweep's record, `trials.json`, as its readers see it: typed, and checked."""

from typing import Any, Literal

from pydantic import AwareDatetime, Field

from rayemb.config import Config

Mode = Literal["max", "min"]


class Objective(Config):
    """What a sweep is after."""

    name: str
    mode: Mode = "max"


class TrialRecord(Config):
    """One trial as it stands."""

    id: str
    settings: dict[str, Any] = Field(description="searched key: value; empty: the config as it was")
    config: str = Field("", description="its resolved config, beside trials.json")
    state: Literal["finished", "pruned", "failed", "stopped", "running"]
    attempts: int = Field(1, ge=0)
    error: str | None = None
    seconds: float | None = None
    step: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict, description="the last of each")
    curve: tuple[dict[str, float], ...] = Field((), description="a report a row, with its step")
    model: str | None = Field(None, description="URI of the trained model")
    schedule: tuple[dict[str, Any], ...] = Field(
        (), description="population-based: which settings held from which step"
    )


class SweepRecord(Config):
    """A sweep as it stands."""

    format: Literal[1] = 1
    name: str
    created: AwareDatetime
    fingerprint: str = Field("", description="of config, corpus and search")
    corpus: str = ""
    search: dict[str, str]
    objectives: tuple[Objective, ...] = Field(min_length=1)
    searcher: str
    scheduler: str
    fidelity: str = "steps"
    total: int = Field(0, ge=0, description="trials that there shall be")
    seconds: float = 0.0
    state: Literal["running", "finished", "stopped", "interrupted"]
    trials: tuple[TrialRecord, ...] = ()
    best: tuple[str, ...] = Field((), description="ids: the best trial, or the Pareto front of several objectives")
    note: str = ""
