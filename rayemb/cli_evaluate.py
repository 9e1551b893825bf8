"""`rayemb evaluate` and `rayemb compare`: what a model is worth, and which of two is better."""

import json
from typing import Annotated

import typer
from rich.console import Console

from rayemb.errors import RayembError

Args = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file, if any, then overrides such as evaluate.max_rows=1000; of a suite: overrides of the suite.",
    ),
]
Require = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'METRIC>=NUMBER'",
        help="What the model must reach, else exit code 1: 'recall@10>=0.6', 'task/direction/ndcg@10>0.4', "
        "'low(recall@10)>=0.55' of the interval, 'gain(recall@10)>0' on the baseline, 'low(gain(recall@10))>0'. "
        "May be repeated; a name that fits several figures asks for all of them.",
    ),
]
Junit = Annotated[str | None, typer.Option(metavar="FILE", help="Also write what came of it as JUnit XML, for CI.")]


def evaluate(
    args: Args = None,
    suite: Annotated[str | None, typer.Option(metavar="FILE", help="A suite of tasks instead (YAML).")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Of a suite: a model directory, a sentence-transformers one, or the URL of a service."),
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help='Of a suite: as --model, or "untrained"; may be repeated.')
    ] = None,
    out: Annotated[str | None, typer.Option(help="Of a suite: the folder of the report.")] = None,
    key: Annotated[str | None, typer.Option(envvar="RAYEMB_KEY", help="API key of the service.")] = None,
    require: Require = None,
    junit: Junit = None,
) -> None:
    """Judge the model on held-out pairs, or on a suite of tasks; writes metrics.json and a page with plots.

    Exit code 1: it does not meet what is required.
    """
    from rayemb.evaluate.gate import Gate

    gate = Gate.of(require, junit)
    if suite is not None:
        from rayemb.pipeline.evaluation import evaluate_suite, read_suite

        config = read_suite(suite, args or [], model=model, baselines=baseline, out=out)
        passed = evaluate_suite(config, gate, key=key)
    elif model or baseline or out:
        raise RayembError("--model, --baseline and --out are of a suite", where="evaluate", fix="--suite FILE")
    else:
        from rayemb.cli import read_config

        run = read_config(args)
        from rayemb.pipeline.evaluation import evaluate_run  # after the config is known to be right: it imports Ray

        passed = evaluate_run(run, gate)
    if not passed:
        raise typer.Exit(1)


def compare(
    reports: Annotated[
        list[str], typer.Argument(metavar="A B [A2 B2]...", help="Reports of one suite; more pairs: of other seeds.")
    ],
    metric: Annotated[
        list[str] | None, typer.Option(help="Only this one, as in --require; may be repeated. Default: all.")
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    out: Annotated[str | None, typer.Option(help="Also write a page with a forest plot into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say whether model A is better than model B, from the reports of a suite: differences, intervals, verdicts."""
    from rayemb.pipeline.comparison import compare

    # As JSON the table is in nobody's way.
    console = Console(highlight=False, stderr=as_json)
    found = compare(reports, console, metrics=metric or (), confidence=confidence, out=out)
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=2))
