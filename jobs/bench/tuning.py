"""Was it worth the search? What a sweep found beside the default and random choices, on data that chose nothing.

`python jobs/bench/tuning.py WORKSPACE/sweeps/temperature --seeds 3 --randoms 5 --test zero_shot`

Every setting is trained anew with seeds that the sweep did not use, all to the end, as one grid on Ray Tune; the figure
is of a split that neither training nor the choice saw. Run it again after an interruption and it goes on. Also, for
each seed, what a choice among these settings by a metric without labels loses against the best one of that seed on the
validation split. Prints a section of Markdown.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from scipy import stats

from rayemb import storage
from rayemb.config import from_mapping
from rayemb.pipeline import RunConfig
from rayemb.pipeline.stages import run_stage
from rayemb.tune import load_record
from rayemb.tune.label_free import LABEL_FREE, choices
from rayemb.tune.results import SweepRecord
from rayemb.tune.space import parse_space

SEEDS_FROM = 1000
GOAL = "val/recall@1"


def main() -> None:
    """Trains what is compared, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="folder of a sweep over one number")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--randoms", type=int, default=5, help="random choices out of the same space")
    parser.add_argument("--test", default="zero_shot", help="the split that nobody has seen")
    parser.add_argument("--rows", type=int, default=2000, help="of it")
    parser.add_argument("--metric", default="recall@10", help="of it")
    arguments = parser.parse_args()
    run = yaml.safe_load(storage.read_bytes(storage.join(arguments.sweep, "sweep.yaml")))
    base = from_mapping(RunConfig, run)
    found = load_record(arguments.sweep)
    if found is None:
        raise SystemExit(f"{arguments.sweep} holds no sweep")
    ((key, text),) = found["search"].items()
    default = _value(base.train.model_dump(), key)
    best = next(trial["settings"][key] for trial in found["trials"] if trial["id"] == found["best"][0])
    draw = parse_space({key: text}).parameters[0].distribution
    state = np.random.RandomState(SEEDS_FROM)  # Ray's domains want this kind
    randoms = [float(draw.domain().sample(random_state=state)) for _ in range(arguments.randoms)]
    settings = {"default": default, "found": best} | {f"random {n + 1}": value for n, value in enumerate(randoms)}
    record = _trained(run, base, key, list(settings.values()), arguments)
    test = f"test/{arguments.metric}"
    print(_section(record, settings, key, test, arguments))


def _value(data: dict[str, Any], key: str) -> float:
    node: Any = data
    for part in key.split("."):
        node = node[part]
    return float(node)


def _trained(
    run: dict[str, Any], base: RunConfig, key: str, values: Sequence[float], arguments: argparse.Namespace
) -> SweepRecord:
    """All settings with all seeds."""
    seeds = [SEEDS_FROM + n for n in range(arguments.seeds)]
    tasks = {
        "val": {"kind": "retrieval"},
        "test": {"kind": "retrieval", "split": arguments.test, "rows": arguments.rows},
    }
    tune = {
        **run["tune"],
        "name": f"{run['tune'].get('name') or 'sweep'}-beside",
        "search": {key: f"grid_search({list(values)})", "seed": f"grid_search({seeds})"},
        "searcher": {"name": "grid"},
        "scheduler": {"name": "none"},
        "objectives": {GOAL: "max"},
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
    record: SweepRecord, settings: dict[str, float], key: str, test: str, arguments: argparse.Namespace
) -> str:
    rows = {name: _of(record, key, value, test) for name, value in settings.items()}
    validation = {name: _of(record, key, value, GOAL) for name, value in settings.items()}
    lines = [
        f"`{key}`, {arguments.seeds} seeds new to the sweep, {arguments.rows:,} rows of `{arguments.test}`.\n",
        f"| choice | {key} | {GOAL} | {test} |",
        "|---|---|---|---|",
    ]
    for name, value in settings.items():
        lines.append(f"| {name} | {value:.4g} | {_spread(validation[name])} | {_spread(rows[name])} |")
    gained = [a - b for a, b in zip(rows["found"], rows["default"], strict=True)]
    others = [statistics.fmean(values) for name, values in rows.items() if name.startswith("random")]
    middle = statistics.median(others)
    lines += [
        f"\nFound − default: {_interval(gained)}, paired by seed. Median of {len(others)} random ones: {middle:.4f}; "
        f"found: {statistics.fmean(rows['found']):.4f}.",
        "\n| metric without labels | held to be good | regret in points of recall@1, by seed | mean |",
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


def _of(record: SweepRecord, key: str, value: float, metric: str) -> list[float]:
    """The metric of a setting, in the order of the seeds."""
    trials = [t for t in record.trials if t.settings[key] == value and t.metrics.get(metric) is not None]
    return [trial.metrics[metric] for trial in sorted(trials, key=lambda trial: trial.settings["seed"])]


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
