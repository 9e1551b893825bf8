"""`rayemb evaluate`: what is required is checked before the work, and decides the exit code after it."""

from rich.console import Console

from rayemb import storage
from rayemb.data import Corpus
from rayemb.evaluate.gate import Gate
from rayemb.evaluate.report import read_report
from rayemb.evaluate.run import yields
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.display import Display
from rayemb.pipeline.stages import run_stage


def evaluate_run(config: RunConfig, gate: Gate, display: Display | None = None) -> bool:
    """Evaluates the model on the splits of its corpus; whether it meets what is required.

    Raises EvaluateError before anything starts if a requirement names what will not be measured.
    """
    display = display or Display()
    if gate.requirements:
        with storage.environment(config.storage.environment()):
            # No split to judge is an error of the stage, which names those that there are.
            if offered := yields(config.evaluate, Corpus.open(config.uri("corpus")).splits):
                gate.check(offered)
    outcome = run_stage("evaluate", config, display)
    with storage.environment(config.storage.environment()):
        return passes(gate, outcome.uri, display.console)


def passes(gate: Gate, report_uri: str, console: Console) -> bool:
    """Whether the report in that folder meets what is required; a line each, those that failed on stderr."""
    if not gate.requirements:
        return True
    outcomes = gate.judge(read_report(report_uri))
    failures = Console(stderr=True, highlight=False, soft_wrap=True)
    for each in outcomes:
        if each.passed:
            console.print(f"  passed  {each.line}", markup=False)
        else:
            failures.print(f"failed  {each.line}", markup=False)
    if gate.junit:
        console.print(f"  → {gate.junit}", markup=False)
    return all(each.passed for each in outcomes)
