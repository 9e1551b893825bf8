"""What every page of a report is made of: one template folder, plots as inline SVG, one way to write figures."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stand-ins that matplotlib writes into the SVG, and the page's own colours that replace them.
INK, MUTED, GRID, BACK = "#010101", "#020202", "#030303", "#040404"
SYSTEMS = ("#050501", "#050502", "#050503", "#050504")
HATCHES = ("", "////", "----", "\\\\\\\\")
_COLOURS = {INK: "ink", MUTED: "muted", GRID: "line", BACK: "card"} | {
    stand_in: f"system-{number}" for number, stand_in in enumerate(SYSTEMS)
}


def css(number: int) -> str:
    """The colour of system `number` on a page."""
    return f"var(--system-{number % len(SYSTEMS)})"


def figure_text(value: float) -> str:
    """Three decimals; below 0.01 two significant digits, since chance is often less than 0.001."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def signed_text(value: float) -> str:
    """As `figure_text`, of a difference."""
    return ("+" if value > 0 else "−" if value < 0 else "±") + figure_text(abs(value))


def style(axes: Any, title: str) -> None:
    """Gives axes the look of the page."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, parse_math=False)
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=2)
    axes.tick_params(axis="y", length=0)


def new_figure(width: float, height: float, *, wspace: float | None = None) -> "Figure":
    """An empty figure, in inches; `wspace`: between its panels, of their width."""
    # Not above: every worker imports this room for its metrics, and draws nothing.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=wspace))


def svg_of(figure: "Figure", name: str, label: str) -> Markup:
    """The figure as an inline `<svg>`: page colours, ids unique on the page, no metadata, no URL."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"\s+", " ", svg)
    svg = re.sub(r"""<svg[^>]*viewBox="([^"]+)"[^>]*>""", r'<svg viewBox="\1">', svg, count=1)
    # matplotlib's ids are random, and every figure has its own `axes_1`.
    ids = {old: f"{name}-{number}" for number, old in enumerate(re.findall(r'\bid="([^"]+)"', svg))}
    svg = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{ids[m[1]]}"', svg)
    svg = re.sub(r'(?:xlink:)?href="#([^"]+)"', lambda m: f'href="#{ids[m[1]]}"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{ids[m[1]]})", svg)
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def environment(*folders: Path) -> Environment:
    """Templates of `folders`, and `report.css` of all reports; whatever comes from the data is escaped."""
    return Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
