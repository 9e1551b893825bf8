"""`rayemb index plan`: the types worth considering for a table, as a table, and the choice as config."""

import yaml
from rich.console import Console
from rich.table import Table

from rayemb.data import EmbeddingsTable
from rayemb.index import Candidate, Plan, plan_index
from rayemb.pipeline.config import RunConfig


def show_plan(config: RunConfig, console: Console) -> Plan:
    """Plans the index of the run's embeddings in this process, and prints candidates, choice and settings."""
    with console.status("building candidates of a sample"):
        plan = plan_index(EmbeddingsTable.open(config.uri("embeddings")), config.index)
    console.print(plan_table(plan))
    console.print(f"[bold]{plan.chosen.factory}[/bold]: {plan.reason}")
    console.print(yaml.safe_dump({"index": settings(plan.chosen)}, sort_keys=False), markup=False, end="")
    return plan


def plan_table(plan: Plan) -> Table:
    """The candidates, fastest first; those that lack something last."""
    how = "" if plan.measured_rows == plan.rows else f", measured on {plan.measured_rows:,} and extrapolated"
    table = Table(title=f"{plan.rows:,} rows of {plan.dim} dimensions{how}")
    for heading in ("factory", "effort", "bytes a vector", "memory MB", "files MB", "recall", "ms a query", "lacks"):
        table.add_column(heading, justify="left" if heading in ("factory", "effort", "lacks") else "right")
    for each in sorted(plan.candidates, key=lambda each: (bool(each.lacks), each.ms)):
        table.add_row(
            each.factory,
            " ".join(f"{name}={value}" for name, value in settings(each).items() if name != "factory"),
            f"{each.bytes_per_vector:,.1f}",
            f"{each.memory_mb:,.1f}",
            f"{each.total_mb:,.1f}",
            f"{each.recall:.3f}",
            f"{each.ms:.3f}",
            each.lacks,
            style="bold" if each is plan.chosen else None,
        )
    return table


def settings(candidate: Candidate) -> dict[str, str | int]:
    """The keys under `index` that build this candidate; of the effort, those that its type has."""
    found: dict[str, str | int] = {"factory": candidate.factory}
    if "IVF" in candidate.factory:
        found["nprobe"] = candidate.effort.nprobe
    if candidate.factory.startswith("HNSW"):
        found["ef_search"] = candidate.effort.ef_search
    if "Refine" in candidate.factory:
        found["rerank"] = candidate.effort.rerank
    return found
