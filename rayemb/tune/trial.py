"""One trial: a driver that holds no CPU and runs trainings of its own, whose reports it passes on to Tune.

With Tune's defaults drivers would hold the very CPUs that their workers wait for. A report counts for Tune when what
it tells of is safe: the last one of a training comes from the driver, when the model is saved and measured, so that a
scheduler that stops a trial at its full budget never stops it before its end.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from rayemb import storage
from rayemb.config import dump
from rayemb.models import Model
from rayemb.train import Stretch, Tracked, TrainConfig, train, train_stretch
from rayemb.train.checkpoints import FOLDER, POSITION
from rayemb.train.sinks.tensorboard import TensorBoardConfig
from rayemb.tune.config import TuneConfig
from rayemb.tune.errors import TuneError
from rayemb.tune.measures import Trained
from rayemb.tune.schedulers import BUDGET, PBTConfig
from rayemb.tune.search import FINISHED
from rayemb.tune.settings import applied

POINTER = "pointer.json"


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep have in common; it comes by pickle to each."""

    config: TuneConfig
    base: TrainConfig
    corpus_uri: str
    uri: str  # of the sweep
    name: str

    @property
    def shared(self) -> str:
        """The name under which the trials of one machine share what they decode."""
        return f"sweep-{storage.sha256_bytes(self.uri.encode())[:16]}"

    @property
    def every(self) -> int:
        """Steps between a trial's reports."""
        return report_every(self.config, self.base)

    def place(self, trial: str) -> str:
        """The folder of a trial."""
        return storage.join(self.uri, "trials", trial)

    def model_uri(self, trial: str) -> str:
        """Where its model lies when it is finished."""
        return storage.join(self.place(trial), "model")

    def run_name(self, trial: str) -> str:
        """What its run is called in logs."""
        return f"{self.name}-{trial}"

    def trained(self, settings: Mapping[str, Any]) -> TrainConfig:
        """The config that a trial with these settings is trained with."""
        return trial_config(self.base, self.config, settings)


def trial_config(base: TrainConfig, config: TuneConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`base` with what every trial changes, and with one trial's settings; evaluated, reported and saved in step.

    Raises TuneError as `applied` does.
    """
    every = report_every(config, base)
    often = {"logging.every": every, "evaluation.every": every, "checkpoints.every": every}
    if isinstance(config.scheduler, PBTConfig):
        # Others may take over a checkpoint long after it was written.
        often["checkpoints.keep"] = 1_000_000
    return applied(base, {**often, **config.set, **settings})


def report_every(config: TuneConfig, base: TrainConfig) -> int:
    """Steps between a trial's reports."""
    return config.report_every or int(config.set.get("evaluation.every", base.evaluation.every))


def budgets(config: TuneConfig, steps: int, every: int) -> list[tuple[float, int]]:
    """The shares of the data that a trial is trained on, one after the other, each with its budget.

    `[(1.0, n)]` where the fidelity is the steps: n reports, the last one rounded up.
    """
    if config.fidelity.name == "steps":
        return [(1.0, math.ceil(steps / every))]
    factor = config.scheduler.reduction_factor  # type: ignore[union-attr]
    rungs = max(1, round(math.log(1 / config.fidelity.least) / math.log(factor)))
    return [(factor ** float(rung - rungs), factor**rung) for rung in range(rungs + 1)]


def at_fraction(config: TrainConfig, share: float) -> TrainConfig:
    """The config on a share of its data, with as many steps less, so that epochs and schedule stay the same."""
    if share == 1.0:
        return config
    data = config.model_dump(mode="json")
    for corpus in data["corpora"].values():
        corpus["fraction"] *= share
    data["steps"] = max(1, round(share * config.steps))
    data["schedule"]["warmup_steps"] = round(share * config.schedule.warmup_steps)
    return TrainConfig.model_validate(data)


class Reports(TuneReportCallback):  # type: ignore[misc]
    """Passes on the training's reports that have what trials are compared by, but for the last one."""

    def __init__(self, needed: list[str], every: int, steps: int) -> None:
        super().__init__()
        self.needed, self.every, self.steps = needed, every, steps

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Takes what all workers reported; rank 0's stands for all."""
        row = metrics[0]
        if row["step"] < self.steps and all(row.get(name) is not None for name in self.needed):
            super().after_report(run_context, [{**row, BUDGET: row["step"] / self.every}], None)


def run_trial(plan: Plan, draw: Mapping[str, Any]) -> None:
    """Trains with a draw's settings, reporting to Tune; called again, it goes on from what it finds."""
    trial = str(tune.get_context().get_trial_id())
    settings = plan.config.space.settings(draw)
    config = plan.trained(settings)
    write_config(plan, trial, config)
    config = _own(config, plan, trial)
    tracked = Tracked(
        plan.run_name(trial),
        {"sweep": plan.name, "trial": trial, **{key: json.dumps(value) for key, value in settings.items()}},
    )
    run = _population if isinstance(plan.config.scheduler, PBTConfig) else _alone
    run(plan, trial, config, tracked)


def _alone(plan: Plan, trial: str, config: TrainConfig, tracked: Tracked) -> None:
    """One training, or one for each share of the data."""
    needed = [name for name in plan.config.objectives if name not in plan.config.measured]
    rungs = budgets(plan.config, config.steps, plan.every)
    place = plan.place(trial)
    for share, budget in rungs:
        last = budget == rungs[-1][1]
        part = at_fraction(config, share)
        name = "model" if last else f"model-{budget}"
        runs = storage.join(place, "runs")
        callbacks = [Reports(needed, plan.every, config.steps)] if len(rungs) == 1 else None
        model_uri = storage.join(place, name)
        model = train(part, plan.corpus_uri, model_uri, runs, callbacks=callbacks, tracked=tracked)
        figures = _measured(plan, model, model_uri, part) if last else {}
        tidy(runs)
        tune.report({**_last(model), **figures, BUDGET: budget, FINISHED: last})


def _population(plan: Plan, trial: str, config: TrainConfig, tracked: Tracked) -> None:
    """A training in stretches, each from the checkpoint that Tune points to: this trial's own or a better one's."""
    every = plan.every * plan.config.scheduler.interval  # type: ignore[union-attr]
    step, begin, schedule = _pointed()
    schedule = [*schedule, {"step": step, "trial": trial, "settings": dict(tracked.tags)}]
    while True:
        until = min(config.steps, (step // every + 1) * every)
        # A folder for each beginning: what an exploit left behind is no checkpoint of this stretch.
        name = storage.sha256_bytes(f"{begin}|{step}".encode())[:12]
        runs = storage.join(plan.place(trial), "runs", f"{step:09d}-{name}")
        model, begin, position = train_stretch(
            config, plan.corpus_uri, plan.model_uri(trial), runs, Stretch(until, begin), tracked=tracked
        )
        step = int(position["step"])
        row = {**position["metrics"], "schedule": json.dumps(schedule)}
        if model is not None:
            # A little less than the next exploit's time: it would come too late for anything.
            figures = _measured(plan, model, plan.model_uri(trial), config)
            tune.report({**row, **figures, BUDGET: (step - 1) / plan.every, FINISHED: True})
            return
        with tempfile.TemporaryDirectory() as folder:
            pointer = {"step": step, "checkpoint": begin, "schedule": schedule}
            Path(folder, POINTER).write_text(json.dumps(pointer), encoding="utf-8")
            report = {**row, BUDGET: step / plan.every, FINISHED: False}
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def _pointed() -> tuple[int, str | None, list[dict[str, Any]]]:
    """The step, the checkpoint and the settings so far that Tune would have this trial go on from."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return 0, None, []
    with checkpoint.as_directory() as folder:
        pointer = json.loads(Path(folder, POINTER).read_text(encoding="utf-8"))
    return int(pointer["step"]), str(pointer["checkpoint"]), pointer["schedule"]


def _own(config: TrainConfig, plan: Plan, trial: str) -> TrainConfig:
    """The config with a folder of the trial's own for TensorBoard, beside other trials', and decoded rows shared."""
    sinks = []
    for sink in config.logging.sinks:
        if isinstance(sink, TensorBoardConfig):
            folder = sink.uri or storage.join(plan.uri, "tensorboard")
            sink = sink.model_copy(update={"uri": storage.join(folder, *([plan.name] if sink.uri else []), trial)})
        sinks.append(sink)
    logging = config.logging.model_copy(update={"sinks": sinks})
    loader = config.loader.model_copy(update={"shared": config.loader.shared or plan.shared})
    return config.model_copy(update={"logging": logging, "loader": loader})


def write_config(plan: Plan, trial: str, config: TrainConfig) -> None:
    """Writes a trial's resolved config, as `rayemb train` reads it."""
    write_run_config(storage.join(plan.uri, "configs", f"{trial}.yaml"), plan, config)


def write_run_config(uri: str, plan: Plan, config: TrainConfig) -> None:
    """Writes a config of the training as a file of the whole line's."""
    train_section = "".join(f"  {line}\n" for line in dump(config).splitlines())
    text = f"artefacts:\n  corpus: {json.dumps(plan.corpus_uri)}\n\ntrain:\n{train_section}"
    storage.write_bytes(uri, text.encode())


def _measured(plan: Plan, model: Model, model_uri: str, config: TrainConfig) -> dict[str, float]:
    figures: dict[str, float] = {}
    for measure in plan.config.measures:
        found = measure.measure(Trained(model, model_uri, plan.corpus_uri, config))
        if missing := [name for name in measure.metrics if not math.isfinite(found.get(name, math.nan))]:
            raise TuneError(f"the measure {measure.name} gives no finite {missing[0]}", where=model_uri)
        figures |= found
    return figures


def _last(model: Model) -> dict[str, Any]:
    """The last report of a training."""
    return dict(model.info["training"][-1])


def tidy(runs_uri: str) -> None:
    """Removes the checkpoints of trainings that are over; what they reported stays."""
    for file in storage.list_files(runs_uri, f"/{POSITION}"):
        folder = file.rsplit(f"/{FOLDER}/", 1)[0]
        storage.delete(storage.join(folder, FOLDER))
