"""The artefact of a sweep: `trials.json`, all trials as they stand, written anew whenever one reports."""

from typing import Any, Literal

from pydantic import AwareDatetime, Field

from rayemb import storage
from rayemb.config import Config, from_mapping
from rayemb.tune.errors import TuneError

RECORD = "trials.json"
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
    state: Literal["finished", "pruned", "failed", "running"]
    attempts: int = Field(1, ge=1)
    error: str | None = None
    seconds: float | None = None
    step: int | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict, description="the last of each")
    curve: tuple[dict[str, float | None], ...] = Field((), description="a report a row, with its step")
    model: str | None = Field(None, description="URI of the trained model")


class SweepRecord(Config):
    """A sweep as it stands."""

    format: Literal[1] = 1
    name: str
    created: AwareDatetime
    search: dict[str, str]
    objectives: tuple[Objective, ...] = Field(min_length=1)
    searcher: str
    scheduler: str
    state: Literal["running", "finished", "stopped", "interrupted"]
    trials: tuple[TrialRecord, ...] = ()
    best: tuple[str, ...] = Field((), description="ids: the best trial, or the Pareto front of several objectives")
    note: str = ""


def read_record(uri: str) -> SweepRecord:
    """The sweep in the folder `uri`. Raises TuneError where there is none, ConfigError if it is damaged."""
    source = storage.join(uri, RECORD)
    try:
        return from_mapping(SweepRecord, storage.read_json(source), source=source)
    except storage.MissingError as error:
        raise TuneError("there is no sweep", where=source, fix="name the folder of a sweep") from error
