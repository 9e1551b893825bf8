"""Differences with their intervals, one under the other, about the line of no difference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from rayemb.evaluate.page import INK, MUTED, SYSTEMS, figure_text, new_figure, signed_text, style, svg_of

if TYPE_CHECKING:
    from rayemb.evaluate.compare import Compared

# Filled: shown. The shape says of which kind, without colour too.
_LOOKS = {
    "better": (SYSTEMS[3], "^", True),
    "worse": (SYSTEMS[2], "v", True),
    "no difference shown": (MUTED, "o", False),
}


def forest(figures: "Sequence[Compared]", name: str, ends: tuple[float, float]) -> Markup:
    """A line a figure; `ends`: of the axis, so that several plots have one scale."""
    picture = new_figure(4.6, 0.6 + 0.24 * len(figures))
    axes = picture.subplots()
    style(axes, "")
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=INK, lw=1)
    said = []
    for row, each in enumerate(figures):
        colour, marker, filled = _LOOKS[each.verdict]
        axes.hlines(row, each.low, each.high, color=colour, lw=1.8)
        axes.plot(each.difference, row, marker=marker, ms=5.5, color=colour, mfc=colour if filled else "none", mew=1.4)
        ends_said = f"{signed_text(each.low)} to {signed_text(each.high)}"
        said.append(f"{each.metric} {signed_text(each.difference)} ({ends_said}), {each.verdict}")
    axes.set_yticks(range(len(figures)), [each.metric for each in figures], parse_math=False)
    axes.set_ylim(len(figures) - 0.4, -0.6)
    room = 0.05 * max(ends[1] - ends[0], 1e-6)
    axes.set_xlim(ends[0] - room, ends[1] + room)
    axes.set_xlabel("A − B", fontsize=8, color=MUTED)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: signed_text(value) if value else figure_text(0))
    return svg_of(picture, name, f"Forest plot of {figures[0].task}, A minus B. {'; '.join(said)}.")
