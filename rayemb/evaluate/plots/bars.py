"""Every metric of every system of one split, with its interval."""

from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from rayemb.evaluate.page import BACK, HATCHES, INK, MUTED, SYSTEMS, figure_text, new_figure, style, svg_of

if TYPE_CHECKING:
    from rayemb.evaluate.report import SplitResult


def bars(result: "SplitResult", number: int) -> Markup:
    """Bars of every metric and system with their intervals, one panel a direction."""
    figure = new_figure(9.6, 3.1, wspace=0.06)
    panels = figure.subplots(1, len(result.directions), sharey=True, squeeze=False)[0]
    top = 0.0
    for axes, part in zip(panels, result.directions, strict=True):
        style(axes, part.direction)
        width = 0.82 / len(part.systems)
        for row, system in enumerate(part.systems):
            at = np.arange(len(part.columns)) + (row - (len(part.systems) - 1) / 2) * width
            values = [system.metrics[name].value for name in part.columns]
            look = row % len(SYSTEMS)
            axes.bar(at, values, width * 0.9, color=SYSTEMS[look], hatch=HATCHES[look], edgecolor=BACK, lw=0)
            for x, name in zip(at, part.columns, strict=True):
                estimate = system.metrics[name]
                if estimate.low is not None:
                    axes.vlines(x, estimate.low, estimate.high, color=INK, lw=1.2)
                ceiling = max(estimate.value, estimate.high or 0.0)
                top = max(top, ceiling)
                axes.annotate(
                    _short(estimate.value),
                    (x, ceiling),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=6.5,
                    color=MUTED,
                )
        axes.set_xticks(range(len(part.columns)), part.columns, parse_math=False)
        axes.tick_params(axis="x", length=0)
    panels[0].set_ylim(0, max(top * 1.12, 0.01))
    said = "; ".join(
        f"{part.direction}, {name}: "
        + ", ".join(f"{system.system} {figure_text(system.metrics[name].value)}" for system in part.systems)
        for part in result.directions
        for name in part.columns
    )
    return svg_of(figure, f"split{number}", f"Bar chart of split {result.split}. {said}.")


def _short(value: float) -> str:
    """For the tight space above a bar: `.82`, `1`, `.002`."""
    text = f"{value:.2f}" if value >= 0.095 or value == 0 else f"{value:.1g}"
    return "1" if text == "1.00" else "0" if float(text) == 0 else text.removeprefix("0")
