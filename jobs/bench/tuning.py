"""Was it worth the search? What a sweep found beside the default and random choices, on data that chose nothing.

`python jobs/bench/tuning.py WORKSPACE/sweeps/temperature --seeds 3 --randoms 5 --test zero_shot`

Every setting is trained anew with seeds that the sweep did not use, all to the end, as one grid on Ray Tune; the figure
is of a split that neither training nor the choice saw. Run it again after an interruption and it goes on. Also, for
each seed, what a choice among these settings by a metric without labels loses against the best one of that seed on the
validation split. Prints a section of Markdown.

`python jobs/bench/tuning.py --terms FOLDER --loss debiased` writes pairs of texts and a sweep (`FOLDER/tune.yaml`):
inclusion terms of ICD-10-CM seek the descriptions of their codes; some 1,200 pairs validate, where the demo has 512.
Beyond the library's packages: `pip install simple-icd-10-cm==1.5.0`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from loss_behaviour import read_corpus
from scipy import stats

from rayemb import storage
from rayemb.config import from_mapping
from rayemb.pipeline import RunConfig
from rayemb.pipeline.stages import run_stage
from rayemb.tune import load_record
from rayemb.tune.label_free import LABEL_FREE, choices
from rayemb.tune.results import SweepRecord, TrialRecord
from rayemb.tune.space import parse_space

RANDOMS = 1000  # the seed of the random choices
TERMS = """
corpus:
  source:
    name: jsonl
    columns: {image: null, query: query, text: text, concept: concept}
  val_fraction: 0.1
train:
  batch_size: 128
  workers: 1
  cpus_per_worker: 0.5
  model:
    image: null
    dim: 128
    text: {width: 128, depth: 2, heads: 4}
    tokenizer: {vocab_size: 8000}
  loss: {name: infonce, learnable_temperature: false, min_temperature: 0.001}
tune:
  name: temperature
  search:
    loss.temperature: loguniform(0.005, 0.5)
  set: {steps: 600, schedule.warmup_steps: 60}
  objectives: {val/recall@10: max}
  searcher: {name: tpe, startup_trials: 5}
  scheduler: {name: asha, grace: 2, reduction_factor: 2}
  trials: 12
  concurrent: 2
  report_every: 100
  retries: 1
"""


def main() -> None:
    """Trains what is compared, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", help="folder of a sweep over one number")
    parser.add_argument("--terms", type=Path, metavar="FOLDER", help="write pairs and a sweep there, and end")
    parser.add_argument("--loss", default="infonce", help="of the sweep that is written: any with a temperature")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1000, help="seeds that no earlier look has seen")
    parser.add_argument("--randoms", type=int, default=5, help="random choices out of the same space")
    parser.add_argument("--test", default="zero_shot", help="the split that nobody has seen")
    parser.add_argument("--rows", type=int, default=2000, help="of it")
    parser.add_argument("--metric", default="recall@10", help="of it")
    arguments = parser.parse_args()
    if arguments.terms:
        return write_terms(arguments.terms, arguments.loss)
    if not arguments.sweep:
        parser.error("the folder of a sweep is missing")
    run = yaml.safe_load(storage.read_bytes(storage.join(arguments.sweep, "sweep.yaml")))
    base = from_mapping(RunConfig, run)
    found = load_record(arguments.sweep)
    if found is None:
        raise SystemExit(f"{arguments.sweep} holds no sweep")
    ((key, text),) = found["search"].items()
    default = _value(base.train.model_dump(), key)
    best = next(trial["settings"][key] for trial in found["trials"] if trial["id"] == found["best"][0])
    draw = parse_space({key: text}).parameters[0].distribution
    state = np.random.RandomState(RANDOMS)  # Ray's domains want this kind
    randoms = [float(draw.domain().sample(random_state=state)) for _ in range(arguments.randoms)]
    settings = {"default": default, "found": best} | {f"random {n + 1}": value for n, value in enumerate(randoms)}
    record = _trained(run, "beside", {key: f"grid_search({list(settings.values())})"}, arguments)
    # What one gets who sets nothing: a temperature that is learned, where the loss learns one.
    plain = {**run, "train": {**run["train"], "loss": {"name": run["train"]["loss"]["name"]}}}
    shipped = _trained(plain, "shipped", {}, arguments)
    print(_section(record, shipped, settings, key, f"test/{arguments.metric}", arguments))


def write_terms(folder: Path, loss: str) -> None:
    """`pairs.jsonl` and `tune.yaml` in `folder`."""
    corpus = read_corpus()
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / "pairs.jsonl"
    with pairs.open("w") as file:
        for number, (term, code) in enumerate(zip(corpus.term, corpus.code, strict=True)):
            text = corpus.texts[code]
            row = {"id": f"{number:05}", "query": corpus.texts[term], "text": text, "concept": text}
            file.write(json.dumps(row) + "\n")
    run = yaml.safe_load(TERMS)
    run["workspace"] = str(folder.resolve() / "workspace")
    run["corpus"]["source"]["uri"] = str(pairs.resolve())
    run["train"]["loss"]["name"] = loss
    sweep = folder / "tune.yaml"
    sweep.write_text(yaml.safe_dump(run, sort_keys=False))
    print(f"{len(corpus.term):,} pairs; now: rayemb data build {sweep} && rayemb tune {sweep}")


def _value(data: dict[str, Any], key: str) -> float:
    node: Any = data
    for part in key.split("."):
        node = node[part]
    return float(node)


def _trained(run: dict[str, Any], name: str, search: dict[str, str], arguments: argparse.Namespace) -> SweepRecord:
    """All settings of `search` with all seeds."""
    seeds = [arguments.first_seed + n for n in range(arguments.seeds)]
    tasks = {
        "val": {"kind": "retrieval"},
        "test": {"kind": "retrieval", "split": arguments.test, "rows": arguments.rows},
    }
    tune = {
        **run["tune"],
        "name": f"{run['tune'].get('name') or 'sweep'}-{name}-{seeds[0]}-{arguments.seeds}",
        "search": {**search, "seed": f"grid_search({seeds})"},
        "searcher": {"name": "grid"},
        "scheduler": {"name": "none"},
        "measures": [{"name": "diagnostics", "names": ["lidar", "separability"]}],
        "watch": [],
        "trials": None,
        "keep_models": "best",
    }
    train = {**run["train"], "evaluation": {**run["train"]["evaluation"], "tasks": tasks}}
    config = from_mapping(RunConfig, {**run, "train": train, "tune": tune})
    outcome = run_stage("tune", config)
    return from_mapping(SweepRecord, load_record(outcome.uri) or {}, source=outcome.uri)


def _section(
    record: SweepRecord,
    shipped: SweepRecord,
    settings: dict[str, float],
    key: str,
    test: str,
    arguments: argparse.Namespace,
) -> str:
    goal = record.objectives[0].name
    trials = {name: [t for t in record.trials if t.settings[key] == value] for name, value in settings.items()}
    trials["as shipped"] = list(shipped.trials)
    rows = {name: _of(part, test) for name, part in trials.items()}
    validation = {name: _of(part, goal) for name, part in trials.items()}
    lines = [
        f"`{key}`, {arguments.seeds} seeds new to the sweep, {arguments.rows:,} rows of `{arguments.test}`.\n",
        f"| choice | {key} | {goal} | {test} |",
        "|---|---|---|---|",
    ]
    for name in trials:
        value = f"{settings[name]:.4g}" if name in settings else "as the loss has it"
        lines.append(f"| {name} | {value} | {_spread(validation[name])} | {_spread(rows[name])} |")
    gained = {
        other: _interval([a - b for a, b in zip(rows["found"], rows[other], strict=True)])
        for other in ("default", "as shipped")
    }
    others = [statistics.fmean(values) for name, values in rows.items() if name.startswith("random")]
    middle = f"median of {len(others)} random ones: {statistics.median(others):.4f}; " if others else ""
    lines += [
        f"\nFound − default: {gained['default']}, found − as shipped: {gained['as shipped']}, paired by seed; "
        f"{middle}found: {statistics.fmean(rows['found']):.4f}.",
        f"\n| metric without labels | held to be good | regret in points of {goal}, by seed | mean |",
        "|---|---|---|---|",
    ]
    by_metric: dict[str, list[float]] = {}
    modes: dict[str, str] = {}
    for seed in sorted({trial.settings["seed"] for trial in record.trials}):
        part = tuple(trial for trial in record.trials if trial.settings["seed"] == seed)
        for choice in choices(record.model_copy(update={"trials": part})):
            if choice.metric.startswith("val/") or choice.metric in LABEL_FREE:
                by_metric.setdefault(choice.metric, []).append(100 * choice.regret)
                modes[choice.metric] = choice.mode
    for name, regrets in sorted(by_metric.items(), key=lambda item: statistics.fmean(item[1])):
        said = ", ".join(f"{regret:.1f}" for regret in regrets)
        lines.append(f"| {name} | {modes[name]} | {said} | {statistics.fmean(regrets):.1f} |")
    return "\n".join(lines)


def _of(trials: Sequence[TrialRecord], metric: str) -> list[float]:
    """The metric of a setting's trials, in the order of the seeds."""
    there = [trial for trial in trials if trial.metrics.get(metric) is not None]
    return [trial.metrics[metric] for trial in sorted(there, key=lambda trial: trial.settings["seed"])]


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def _interval(values: Sequence[float]) -> str:
    """The mean with its 95 % interval over seeds (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.4f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


if __name__ == "__main__":
    main()
