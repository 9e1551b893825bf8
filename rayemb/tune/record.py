"""The record of a sweep, `trials.json`: written whole and atomically as trials report, so that it is never half a one.

    {"format": 1, "name", "created", "fingerprint", "search": {parameter: text}, "objectives": [{"name", "mode"}],
     "searcher", "scheduler", "total", "state": "running|finished|stopped|interrupted", "seconds", "note",
     "trials": [{"id", "settings": {key: value}, "config", "state": "running|finished|pruned|failed|stopped",
                 "attempts", "error", "seconds", "step", "metrics": {name: value}, "curve": [{"step", ...}], "model",
                 "schedule"}],
     "best": [ids]}

A trial is pruned where its scheduler ended it, stopped where the sweep's end did. `schedule`, of population-based
training alone: from which step on which settings held, with the trials that the weights came from.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import cloudpickle, tune
from ray.tune.experiment import Trial

from rayemb import storage
from rayemb.errors import RayembError
from rayemb.models.bundle import MANIFEST
from rayemb.train.failures import root
from rayemb.tune.config import REPORTED
from rayemb.tune.search import FINISHED, Objectives
from rayemb.tune.settings import applied
from rayemb.tune.trial import Plan, write_run_config

FORMAT = 1
FILE, BEST = "trials.json", "best.yaml"
WRITE_S = 1.0
SHARE = 0.05  # of the time, at most, goes into writing a long record
_ERROR_CHARS = 1000


def load_record(sweep_uri: str) -> dict[str, Any] | None:
    """The record of the sweep at `sweep_uri`; None if there is none.

    Raises RayembError for one that is no record of this format.
    """
    uri = storage.join(sweep_uri, FILE)
    if not storage.exists(uri):
        return None
    document = storage.read_json(uri)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RayembError(f"not a sweep's record of format {FORMAT}", where=uri, fix="take another tune.name")
    return document


def front(trials: Sequence[Mapping[str, Any]], objectives: Objectives) -> list[Mapping[str, Any]]:
    """The trials that no other is better than in all objectives, the best by the first objective first.

    Of finished ones; where none is finished, of all that reported every objective.
    """
    complete = [trial for trial in trials if all(trial["metrics"].get(name) is not None for name in objectives)]
    chosen = [trial for trial in complete if trial["state"] == "finished"] or complete
    signs = [1.0 if mode == "max" else -1.0 for mode in objectives.values()]

    def values(trial: Mapping[str, Any]) -> tuple[float, ...]:
        return tuple(sign * trial["metrics"][name] for sign, name in zip(signs, objectives, strict=True))

    def beaten(trial: Mapping[str, Any]) -> bool:
        mine = values(trial)
        others = [values(other) for other in chosen]
        return any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in others)

    found = [trial for trial in chosen if not beaten(trial)]
    if len(objectives) == 1:
        found = found[:1]  # of equals, the first
    return sorted(found, key=values, reverse=True)


class Recorder(tune.Callback):  # type: ignore[misc]
    """Keeps the record; a restored sweep's goes on with what is there."""

    def __init__(self, plan: Plan, fingerprint: str) -> None:
        self.plan, self.fingerprint = plan, fingerprint
        self.document: dict[str, Any] = {}
        self._at: dict[str, float] = {}  # of running trials: until when their seconds are counted
        self._began = self._written = time.monotonic()
        self._took, self._changed = 0.0, False

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks at the start; what they have seen since is in the record.
        return {"plan": self.plan, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def setup(self, stop: Any = None, num_samples: int | None = None, **info: Any) -> None:
        """Begins the record, or goes on with it."""
        config = self.plan.config
        there = load_record(self.plan.uri)
        self.document = there or {
            "format": FORMAT,
            "name": self.plan.name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "fingerprint": self.fingerprint,
            "corpus": self.plan.corpus_uri,
            "search": config.space.described,
            "objectives": [{"name": name, "mode": mode} for name, mode in config.objectives.items()],
            "searcher": config.searcher.name,
            "scheduler": config.scheduler.name,
            "fidelity": config.fidelity.name,
            "total": config.total,
            "state": "running",
            "seconds": 0.0,
            "note": "",
            "trials": [],
            "best": [],
        }
        self.document |= {"state": "running", "note": ""}
        self._before = self.document["seconds"]
        self._began = time.monotonic()
        self._write()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial runs, for the first time or again."""
        entry = self._entry(trial)
        entry |= {"state": "running", "attempts": trial.num_failures + 1}
        self._at[trial.trial_id] = time.monotonic()
        self._write()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports."""
        entry = self._entry(trial)
        self._count(trial)
        row = {"step": int(result.get("step", 0)), **_figures(result, self.plan)}
        # One that goes on from a checkpoint may come by the same steps again.
        entry["curve"] = [old for old in entry["curve"] if old["step"] < row["step"]] + [row]
        entry |= {"step": row["step"], "metrics": {k: v for k, v in row.items() if k != "step"}}
        entry["settings"] = self._settings(trial)
        if "schedule" in result:
            entry["schedule"] = json.loads(result["schedule"])
        if result.get(FINISHED):
            model_uri = self.plan.model_uri(trial.trial_id)
            entry |= {"state": "finished", "error": None, "model": model_uri}
            if self.plan.config.fidelity.name == "steps":
                # Workers go on for a while when Tune's process is killed: the model has what nobody heard.
                there = {row["step"] for row in entry["curve"]}
                unheard = [row for row in _history(model_uri) if row["step"] not in there]
                rows = [{"step": int(row["step"]), **_figures(row, self.plan)} for row in unheard]
                entry["curve"] = sorted([*entry["curve"], *rows], key=lambda row: row["step"])
            self._best()
            self._write()
        else:
            self._changed = True

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed and is tried again."""
        self._count(trial)
        self._entry(trial)["error"] = _error(trial)
        self._write()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        self._count(trial)
        self._entry(trial).update(state="failed", error=_error(trial), attempts=trial.num_failures)
        self._write()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Takes over what schedulers ended, and writes what was put off."""
        for trial in trials:
            entry = self._entry(trial)
            if entry["state"] == "running" and trial.status == Trial.TERMINATED:
                self._count(trial)
                entry["state"] = "pruned"
                self._changed = True
        pause = max(WRITE_S, self._took / SHARE)
        if self._changed and time.monotonic() - self._written > pause:
            self._write()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Writes what was put off. Trials that an interrupt ended have ended for Tune by now, and not for the sweep.

        One that Tune's last snapshot before a kill did not have was drawn anew, under another name.
        """
        known = {trial.trial_id for trial in trials}
        self.document["trials"] = [entry for entry in self.document["trials"] if entry["id"] in known]
        self._write()

    def _entry(self, trial: Trial) -> dict[str, Any]:
        for entry in self.document["trials"]:
            if entry["id"] == trial.trial_id:
                return entry  # type: ignore[no-any-return]
        entry = {
            "id": trial.trial_id,
            "settings": self._settings(trial),
            "config": f"configs/{trial.trial_id}.yaml",
            "state": "running",
            "attempts": 0,
            "error": None,
            "seconds": 0.0,
            "step": 0,
            "metrics": {},
            "curve": [],
            "model": None,
        }
        self.document["trials"].append(entry)
        return entry

    def _settings(self, trial: Trial) -> dict[str, Any]:
        return self.plan.config.space.settings(trial.config)

    def _count(self, trial: Trial) -> None:
        """Adds the time since the last event to the trial's seconds."""
        now = time.monotonic()
        if (since := self._at.get(trial.trial_id)) is not None:
            self._entry(trial)["seconds"] += now - since
        self._at[trial.trial_id] = now

    def _best(self) -> None:
        found = front(self.document["trials"], self.plan.config.objectives)
        before = self.document["best"]
        self.document["best"] = [trial["id"] for trial in found]
        if self.document["best"] != before:
            write_best(self.plan, found)

    def _write(self) -> None:
        began = time.monotonic()
        self.document["seconds"] = self._before + began - self._began
        storage.write_json(storage.join(self.plan.uri, FILE), self.document)
        self._changed, self._written = False, time.monotonic()
        self._took = self._written - began


def write_best(plan: Plan, best: Sequence[Mapping[str, Any]]) -> None:
    """Writes `best.yaml`, and each of a front as `best/<id>.yaml`: the whole training with the settings found."""
    for number, trial in enumerate(best):
        config = applied(plan.base, trial["settings"])
        if number == 0:
            write_run_config(storage.join(plan.uri, BEST), plan, config)
        if len(plan.config.objectives) > 1:
            write_run_config(storage.join(plan.uri, "best", f"{trial['id']}.yaml"), plan, config)


def _figures(result: Mapping[str, Any], plan: Plan) -> dict[str, float]:
    """The finite figures of a report that tell of the training; not Ray's own, and no shares of time."""
    wanted = {*REPORTED, *plan.config.measured, *plan.config.objectives, "learning_rate"}
    found = {}
    for name, value in result.items():
        task = "/" in name and not name.startswith(("time/", "config/"))
        if (name in wanted or task) and isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def _history(model_uri: str) -> list[dict[str, Any]]:
    """What a trained model's manifest says of its training; nothing where there is none."""
    uri = storage.join(model_uri, MANIFEST)
    return storage.read_json(uri).get("training", []) if storage.exists(uri) else []


def _error(trial: Trial) -> str:
    error: Any = None
    if (path := trial.pickled_error_file) and os.path.exists(path):
        # Here, and not yet where Tune keeps it, when a trial is about to be tried again.
        with open(path, "rb") as file:
            error = cloudpickle.load(file)
    error = error or trial.get_pickled_error() or trial.get_error()
    if error is None:
        return "no error given"
    cause: Any = getattr(error, "cause", None) or error
    return str(cause)[:_ERROR_CHARS] if isinstance(cause, RayembError) else root(error)[-_ERROR_CHARS:]
