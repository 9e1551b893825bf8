"""A metric over its cut-off."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from rayemb.evaluate.page import MUTED, SYSTEMS, figure_text, new_figure, style, svg_of

if TYPE_CHECKING:
    from rayemb.evaluate.report import Curve

_LINES, _MARKERS = ("-", "--", ":", "-."), "osD^"
# From this many times the first cut-off on, even steps would crowd the first ones.
_WIDE = 20


class CurvePlot(NamedTuple):
    """The lines, and which look each system has."""

    metric: str
    svg: Markup
    legend: list[tuple[int, str]]


def curve_plot(curve: "Curve", name: str, systems: Sequence[str] = ()) -> CurvePlot:
    """A line a system; `systems`: those of the bars beside it, whose colours they keep."""
    figure = new_figure(4.0, 2.4)
    axes = figure.subplots()
    style(axes, "")
    order = [*systems, *(system for system in curve.systems if system not in systems)]
    said = []
    for system, values in curve.systems.items():
        look = order.index(system)
        axes.plot(
            curve.ks,
            values,
            color=SYSTEMS[look % len(SYSTEMS)],
            ls=_LINES[look % len(_LINES)],
            marker=_MARKERS[look % len(_MARKERS)],
            ms=3.5,
            lw=1.7,
        )
        said.append(f"{system} " + ", ".join(f"{figure_text(v)} at {k}" for k, v in zip(curve.ks, values, strict=True)))
    if curve.ks[-1] >= _WIDE * curve.ks[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(curve.ks, [f"{k:,}" for k in curve.ks])
    axes.minorticks_off()
    axes.set_xlabel("k", fontsize=8, color=MUTED)
    axes.set_ylim(0, max(0.01, 1.08 * max(max(values) for values in curve.systems.values())))
    svg = svg_of(figure, name, f"Line chart of {curve.metric} over k: {'; '.join(said)}.")
    return CurvePlot(
        curve.metric, svg, [(look, system) for look, system in enumerate(order) if system in curve.systems]
    )
