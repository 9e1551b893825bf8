"""Runs a sweep on Ray Tune, or goes on with one that was interrupted."""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from rayemb import storage
from rayemb.config import dump, from_mapping
from rayemb.data import Corpus
from rayemb.data.shared import forget
from rayemb.progress import Progress
from rayemb.storage import environment
from rayemb.train import TrainConfig
from rayemb.tune.config import REPORTED, TuneConfig
from rayemb.tune.errors import TuneError
from rayemb.tune.page import write_page
from rayemb.tune.record import BEST, FILE, Recorder, front, load_record, write_best
from rayemb.tune.results import SweepRecord
from rayemb.tune.schedulers import NoneConfig, PBTConfig
from rayemb.tune.search import Objectives
from rayemb.tune.settings import applied, check_space
from rayemb.tune.trial import Plan, budgets, run_trial, tidy

logger = logging.getLogger(__name__)

SLOT = "trial_slot"
TUNE = "tune"  # the folder of what Ray Tune keeps
LOOK_S = 1.0
STATE_TIMEOUT_S = 30
# What may be said otherwise when a sweep goes on.
HOW = {"name", "concurrent", "minutes", "keep_models", "watch"}
SETTINGS = {
    # How often Tune's state is saved at most: what came since is done again after a kill.
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    # What is only measured at a trial's end is no metric of the reports before.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Our own progress tells of trials and their errors.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found; `record` is its `trials.json`."""

    uri: str
    record: dict[str, Any]
    best: TrainConfig

    @property
    def best_trial(self) -> dict[str, Any]:
        """The best by the first objective."""
        return next(trial for trial in self.record["trials"] if trial["id"] == self.record["best"][0])

    @property
    def best_settings(self) -> dict[str, Any]:
        """Its settings."""
        return dict(self.best_trial["settings"])

    @property
    def best_value(self) -> float:
        """Its value of the first objective."""
        return float(self.best_trial["metrics"][self.record["objectives"][0]["name"]])

    @property
    def summary(self) -> str:
        """One line."""
        trial = self.best_trial
        values = ", ".join(f"{o['name']} {trial['metrics'][o['name']]:.4g}" for o in self.record["objectives"])
        settings = ", ".join(f"{key}={_short(value)}" for key, value in trial["settings"].items())
        several = len(self.record["best"])
        chosen = f"; {several} on the front, one" if several > 1 else "; best"
        state = self.record["state"]
        ended = "" if state == "finished" else f" ({state}: {self.record['note']})"
        return f"{_counted(self.record)}{chosen} {values} with {settings}{ended}"

    @property
    def figures(self) -> dict[str, Any]:
        """For machines."""
        return {**self.record, "best_settings": self.best_settings, "best_metrics": self.best_trial["metrics"]}


def check_sweep(config: TuneConfig, base: TrainConfig) -> list[TrainConfig]:
    """The configs of the search space's corners. Needs no Ray.

    Raises TuneError naming the key for whatever would be found wrong later: a key or a value that the training config
    refuses, a metric that nothing yields, a package that is missing, a space that the searcher cannot search.
    """
    space = config.space
    try:
        given = applied(base, config.set)
    except TuneError as error:
        raise TuneError(error.what, where=f"tune.set.{error.where}", fix=error.fix) from error
    corners = check_space(given, space, config.seed)
    _check_objectives(config, corners)
    config.searcher.check(space, config.objectives)
    if isinstance(config.scheduler, PBTConfig):
        config.scheduler.check(space, corners)
        if config.total < 2:
            raise TuneError("a population is two trials or more", where="tune.trials")
    if not isinstance(config.scheduler, NoneConfig) and not _compared(config):
        raise TuneError(
            "a scheduler compares trials on their way, and all objectives are measured at the end",
            where="tune.objectives",
            fix="add one that is reported while training, or use tune.scheduler=none",
        )
    for corner in corners:
        corner.logging.makers()
    return corners


def _check_objectives(config: TuneConfig, corners: list[TrainConfig]) -> None:
    for corner in corners:
        known = [*corner.evaluation.metrics, *REPORTED, *config.measured]
        for section, name in [*(("objectives", n) for n in config.objectives), *(("watch", n) for n in config.watch)]:
            if name not in known:
                raise TuneError(
                    f"no evaluation yields {name!r}; there are {', '.join(known)}",
                    where=f"tune.{section}.{name}",
                    fix="name one of them, or add an evaluation (train.evaluation.tasks) or a measure (tune.measures)",
                )


def _compared(config: TuneConfig) -> str | None:
    """The objective that trials are compared by while they train."""
    return next((name for name in config.objectives if name not in config.measured), None)


def sweep(
    config: TuneConfig, base: TrainConfig, corpus_uri: str, sweeps_uri: str, *, progress: Progress | None = None
) -> SweepResult:
    """Tries the search space around `base`; `trials.json`, `best.yaml`, a page, each trial's config and model lie in
    a folder below `sweeps_uri`.

    The same call again goes on with a sweep that was killed, interrupted or out of time: finished trials stay, others
    go on from their checkpoints; of a finished one it gives what it found. A trial that fails is tried again
    `config.retries` times, and then reported with its error.
    Raises TuneError before any trial as `check_sweep` does, if the cluster is too small, or if the folder holds
    another sweep; and if no trial reported anything. Needs a connected Ray.
    """
    corners = check_sweep(config, base)
    corpus = Corpus.open(corpus_uri)
    said = config.model_dump(mode="json", exclude=HOW)
    document = json.dumps([base.outcome, said, corpus.digest], sort_keys=True)
    fingerprint = storage.sha256_bytes(document.encode())
    name = config.name or f"sweep-{fingerprint[:12]}"
    uri = storage.join(sweeps_uri, name)
    plan = Plan(config, base, corpus.uri, uri, name)
    there = load_record(uri)
    if there and there["fingerprint"] != fingerprint:
        raise TuneError(f"{uri} holds a sweep of another config or corpus", where="tune.name", fix="give another name")
    if there and there["state"] == "finished":
        _write_page(plan, there)  # what is watched may be said otherwise
        return _result(plan, there)
    concurrent = _concurrent(config, corners)
    storage.write_bytes(storage.join(uri, "sweep.yaml"), _sweep_yaml(plan).encode())
    note = ""
    with environment(SETTINGS), _shown(plan, progress, concurrent), _time_limit(config.minutes) as limit:
        tuner = _tuner(plan, corners, concurrent, fingerprint)
        try:
            tuner.fit()
        except KeyboardInterrupt:
            note = "Ctrl-C, twice"
        finally:
            _forget(plan.shared)
        out_of_time = limit.is_set()
    return _finished(plan, note, out_of_time)


def _tuner(plan: Plan, corners: list[TrainConfig], concurrent: int, fingerprint: str) -> tune.Tuner:
    """A new tuner, or the one that was interrupted."""
    config = plan.config
    slots = int(ray.cluster_resources()[SLOT])
    # One who waits in the middle of its training for others to be begun may not be counted: then the slots limit.
    slot = -(-slots // concurrent) if config.scheduler.pauses else 1

    def trial(draw: dict[str, Any]) -> None:
        run_trial(plan, draw)

    trainable = tune.with_resources(trial, {SLOT: slot})
    fs, path = storage.filesystem(plan.uri)
    fs = storage.whole_files(fs)  # a sweep that is killed while Tune writes its state must find the one before
    place = storage.join(plan.uri, TUNE)
    _, place_path = storage.filesystem(place)
    if tune.Tuner.can_restore(place_path, storage_filesystem=fs):
        return tune.Tuner.restore(
            place_path, trainable=trainable, resume_unfinished=True, restart_errored=False, storage_filesystem=fs
        )
    space = config.space
    population = isinstance(config.scheduler, PBTConfig)
    budget = max(budgets(config, corner.steps, plan.every)[-1][1] for corner in corners)
    metric = _compared(config) or ""
    mode = config.objectives.get(metric, "max")
    searcher = (
        BasicVariantGenerator(random_state=config.seed)
        if population
        else config.searcher.build(space, config.objectives, config.seed)
    )
    return tune.Tuner(
        trainable,
        param_space={p.name: p.distribution.domain() for p in space.parameters} if population else {},
        tune_config=tune.TuneConfig(
            num_samples=config.total,
            max_concurrent_trials=None if config.scheduler.pauses else concurrent,
            scheduler=config.scheduler.build(metric, mode, budget, space, bohb=config.searcher.name == "bohb"),
            search_alg=searcher,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=path,
            storage_filesystem=fs,
            failure_config=tune.FailureConfig(max_failures=config.retries),
            callbacks=[Recorder(plan, fingerprint)],
            verbose=0,
        ),
    )


def _forget(name: str) -> None:
    """Removes the decoded rows that trials shared, on every machine that is there."""
    with contextlib.suppress(ray.exceptions.RayError):
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        placed = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
        remote = ray.remote(num_cpus=0)(forget)
        ray.get([remote.options(scheduling_strategy=here).remote(name) for here in placed], timeout=60)


def _finished(plan: Plan, note: str, out_of_time: bool) -> SweepResult:
    """Closes the record: what is not over was stopped with the sweep."""
    record = load_record(plan.uri)
    assert record is not None
    left = [trial for trial in record["trials"] if trial["state"] == "running"]
    whole = not left and len(record["trials"]) >= plan.config.total
    for trial in left:
        trial["state"] = "stopped"
    if whole:
        record["state"] = "finished"
    elif out_of_time:
        record |= {"state": "stopped", "note": f"after {plan.config.minutes:g} minutes; run again to go on"}
    else:
        record |= {"state": "interrupted", "note": note or "run again to go on"}
    found = front(record["trials"], plan.config.objectives)
    record["best"] = [trial["id"] for trial in found]
    for trial in record["trials"] if whole else ():
        tidy(storage.join(plan.place(trial["id"]), "runs"))
        if plan.config.keep_models == "best" and trial["model"] and trial["id"] not in record["best"]:
            storage.delete(trial["model"])
            trial["model"] = None
        if trial["state"] == "pruned":
            _abandon(plan, trial["id"])
    storage.write_json(storage.join(plan.uri, FILE), record)
    write_best(plan, found)
    _write_page(plan, record)
    return _result(plan, record)


def _abandon(plan: Plan, trial: str) -> None:
    """Says so in the logs of a trial that was stopped: its workers had no time to."""
    for sink in plan.base.logging.sinks:
        try:
            sink.abandon(plan.run_name(trial))
        except Exception as error:  # a log that is away is no reason to lose a sweep
            logger.warning("%s still shows %s as running: %s", sink.name, trial, error)


def _write_page(plan: Plan, record: dict[str, Any]) -> None:
    best = storage.join(plan.uri, BEST)
    text = storage.read_bytes(best).decode() if record["best"] else ""
    read = from_mapping(SweepRecord, record, source=storage.join(plan.uri, FILE))
    write_page(plan.uri, read, best_yaml=text, watch=plan.config.watch)


def _result(plan: Plan, record: dict[str, Any]) -> SweepResult:
    names = list(plan.config.objectives)
    if not record["best"]:
        errors = "; ".join(dict.fromkeys(t["error"] for t in record["trials"] if t["error"]))
        raise TuneError(
            f"no trial reported {' and '.join(names)} ({errors[:1500] or 'the sweep ended before'})",
            where=storage.join(plan.uri, FILE),
            fix="mend the cause and take another tune.name, or run again if the sweep was stopped",
        )
    best = next(trial for trial in record["trials"] if trial["id"] == record["best"][0])
    return SweepResult(plan.uri, record, applied(plan.base, best["settings"]))


def _concurrent(config: TuneConfig, corners: list[TrainConfig]) -> int:
    """How many trials the cluster can really run at once: their workers and decoders."""
    resources = ray.cluster_resources()
    if resources.get(SLOT, 0) < 1:
        raise TuneError(
            f"the cluster has no {SLOT!r} resource, so trials would wait for ever",
            where="tune",
            fix=f"start its head with --resources='{{\"{SLOT}\": 2}}'",
        )
    if not isinstance(config.scheduler, NoneConfig):
        _require_state()
    need = max(1.0, *(corner.cpus for corner in corners))  # a tokenizer is learned on one
    fits = int(resources.get("CPU", 0) // need)
    if fits < 1:
        raise TuneError(
            f"a trial needs {need:g} CPUs and the cluster has {resources.get('CPU', 0):g}",
            where="tune.set",
            fix="lower workers or cpus_per_worker there, or add nodes",
        )
    return min(config.concurrent, fits, int(resources[SLOT]))


def _require_state() -> None:
    """Ray Train frees the CPUs of a trial that was stopped when the cluster's state says that its controller is gone.

    Raises TuneError where nobody says so: trials would keep their CPUs, and the sweep wait for ever.
    """
    deadline = time.monotonic() + STATE_TIMEOUT_S
    while True:  # the head of a busy machine may be up before it answers
        try:
            list_actors(limit=1, timeout=STATE_TIMEOUT_S)
            return
        except (RayStateApiException, ConnectionError, ValueError) as error:
            if time.monotonic() < deadline:
                time.sleep(1.0)
                continue
            raise TuneError(
                f"the cluster does not tell its state ({' '.join(str(error).split())[:200]})",
                where="tune.scheduler",
                fix="start its head with a dashboard (--include-dashboard=true), or use tune.scheduler=none",
            ) from error


@contextlib.contextmanager
def _time_limit(minutes: float | None) -> Iterator[threading.Event]:
    """Ends Tune's run as Ctrl-C would when the time is over, so that it can go on later; gives whether it is."""
    over = threading.Event()
    if minutes is None:
        yield over
        return
    if threading.current_thread() is not threading.main_thread():
        raise TuneError("a sweep with a time limit runs in its process's main thread", where="tune.minutes")

    def end() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGUSR1)

    # Tune takes this signal for an interrupt while it runs; before and after it must not end the process.
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    timer = threading.Timer(60 * minutes, end)
    timer.daemon = True
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def _shown(plan: Plan, progress: Progress | None, concurrent: int) -> Iterator[None]:
    """Tells of the sweep as its record grows: a restored one has callbacks of the process that is gone."""
    if progress is None:
        yield
        return
    done = threading.Event()
    total = plan.config.total

    def watch() -> None:
        last = ""
        while not done.wait(LOOK_S):
            with contextlib.suppress(Exception):  # a look at the record must not end the sweep
                record = load_record(plan.uri)
                ended = [t for t in (record or {}).get("trials", []) if t["state"] != "running"]
                text = _state(record, plan.config.objectives) if record else ""
                if text and text != last:
                    last = text
                    progress(min(len(ended), total), total, text)

    progress(0, total, f"{total} trials, {concurrent} at once")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _state(record: dict[str, Any], objectives: Objectives) -> str:
    name = next(iter(objectives))
    values = [t["metrics"][name] for t in record["trials"] if t["metrics"].get(name) is not None]
    best = (max if objectives[name] == "max" else min)(values, default=None)
    return _counted(record) + (f"; best {name} {best:.4g}" if best is not None else "")


def _counted(record: dict[str, Any]) -> str:
    """`12 trials (7 finished, 5 pruned)`."""
    states = [trial["state"] for trial in record["trials"]]
    return f"{len(states)} trials ({', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states))})"


def _sweep_yaml(plan: Plan) -> str:
    """The sweep as it can be run again, from its folder alone."""
    sections = {"tune": plan.config, "train": plan.base}
    head = f"artefacts:\n  corpus: {json.dumps(plan.corpus_uri)}\n  sweeps: {json.dumps(plan.uri.rsplit('/', 1)[0])}\n"
    bodies = ["".join(f"  {line}\n" for line in dump(section).splitlines()) for section in sections.values()]
    return head + "".join(f"\n{name}:\n{body}" for name, body in zip(sections, bodies, strict=True))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
