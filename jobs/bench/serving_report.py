"""The section that `serving.py` prints."""

import os
import statistics
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving import Bench, Side

_FIELDS = ("qps", "p50", "p95", "p99", "cpu", "generator")


def middle(phases: list[dict[str, float]], what: str) -> float:
    """The median over the rounds."""
    return statistics.median(each[what] for each in phases)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def report(bench: "Bench", source: str, inside: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    """The whole section: medians over the rounds."""
    options, (rows, dim) = bench.options, bench.x_ND.shape
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    parts = [
        f"## Serving: {rows:,} x {dim}, {options.factory}, recall@10 of {options.recall}",
        f"`{' '.join(['python', *sys.argv])}`: {source}. Servers on cores {bench.server_cores}, load generators on "
        f"{bench.load_cores}; medians of {options.rounds} rounds of {options.seconds:g} s a phase; load averages at "
        f"the end {load}.",
        "### In process: raw FAISS over the same file, and `rayemb.index.Index`",
        _inside(bench, inside),
        "### Batches of 64 over HTTP, beside raw FAISS in batches of 64 on the same cores",
        _batches(bench, inside),
        "### Single queries beside a no-op behind the same proxy",
        _noop(bench, inside),
        "### End to end, single queries",
        _all(bench, 1),
        "### End to end, batches of 64 (QPS counts queries, times are of requests)",
        _all(bench, 64),
        _about(bench),
    ]
    return "\n\n".join(parts)


def _inside(bench: "Bench", inside: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    rows: list[list[Any]] = []
    for (name, batch), phases in inside.items():
        qps, raw = middle(phases, "qps"), middle(inside["raw FAISS", batch], "qps")
        recall = f"{bench.inside_recall[name]:.3f}"
        rows.append([name, batch, recall, f"{qps:,.0f}", f"{100 * qps / raw:.0f} %", f"{middle(phases, 'p50'):.3f}"])
    return table(["side", "queries a call", "recall@10", "QPS", "of raw FAISS", "p50 ms"], rows)


def _batches(bench: "Bench", inside: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    raw = middle(inside["raw FAISS", 64], "qps")
    rows: list[list[Any]] = []
    for side in bench.sides:
        for (clients, batch), phases in side.found.items():
            if batch == 64 and side.name.startswith("rayemb"):
                qps = middle(phases, "qps")
                rows.append([side.name, side.how, clients, f"{qps:,.0f}", f"{100 * qps / raw:.0f} %"])
    return table(["side", "body", "clients", "QPS", "of raw FAISS"], rows)


def _noop(bench: "Bench", inside: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    own_ms = middle(inside["raw FAISS", 1], "p50")
    floor = {side.name.split(", ", 1)[1]: side for side in bench.sides if side.name.startswith("no-op")}
    rows: list[list[Any]] = []
    for side in bench.sides:
        if not side.name.startswith("rayemb"):
            continue
        noop = floor[side.name.split(", ", 1)[1]]
        for (clients, batch), phases in side.found.items():
            if batch == 1 and (clients, 1) in noop.found:
                base = noop.found[clients, 1]
                share = 100 * middle(phases, "qps") / middle(base, "qps")
                over = middle(phases, "p50") - middle(base, "p50") - own_ms
                cells = [f"{middle(each, 'qps'):,.0f}" for each in (base, phases)]
                rows.append([side.name, side.how, clients, *cells, f"{share:.0f} %", f"{over:+.2f}"])
    head = ["side", "body", "clients", "no-op QPS", "QPS", "of the no-op", "p50 over no-op and FAISS, ms"]
    return table(head, rows)


def _all(bench: "Bench", batch: int) -> str:
    rows: list[list[Any]] = []
    for clients in bench.options.clients:
        for side in sorted(bench.sides, key=lambda side: _speed(side, clients, batch)):
            phases = side.found.get((clients, batch))
            if not phases:
                continue
            recall = "-" if side.recall is None else f"{side.recall:.3f}"
            figures = [middle(phases, name) for name in _FIELDS]
            qps, p50, p95, p99, cpu, generator = figures
            cells = [f"{qps:,.0f}", *(f"{each:.2f}" for each in (p50, p95, p99, cpu)), f"{100 * generator:.0f} %"]
            failed = int(sum(each["failed"] for each in phases))
            rows.append([clients, side.name, side.how, side.parameter or "-", recall, *cells, failed])
    head = ["clients", "side", "how", "parameter", "recall@10", "QPS", "p50 ms", "p95", "p99", "CPU ms a query"]
    return table([*head, "generator's CPU", "failed"], rows)


def _speed(side: "Side", clients: int, batch: int) -> float:
    phases = side.found.get((clients, batch))
    return -middle(phases, "qps") if phases else 0.0


def _about(bench: "Bench") -> str:
    lines = [f"- {name}: {told}" for name, told in bench.about.items()]
    lines += [f"- **not measured**, {name}: {why}" for name, why in bench.missing.items()]
    lines += [f"- {side.name} ({side.how}): {side.note}" for side in bench.sides if side.note]
    for side in bench.sides:
        counts = {clients for clients, batch in side.found if batch == 1}
        left = [str(each) for each in bench.options.clients if each not in counts]
        if left and not side.note and side.found:
            lines.append(f"- {side.name} ({side.how}): not asked by {', '.join(left)} clients, too slow for it")
    return "Peers, with what it took to build them (`m` 16, `ef_construction` 100 where there is a graph):\n\n" + (
        "\n".join(lines) or "- none"
    )
