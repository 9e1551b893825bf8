"""How alike positives are, and how alike negatives: the two histograms, and how far they overlap."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from rayemb.evaluate.page import BACK, INK, MUTED, SYSTEMS, figure_text, new_figure, style, svg_of

if TYPE_CHECKING:
    from rayemb.evaluate.report import Similarities


class SimilarityPlot(NamedTuple):
    """The histograms, and what they say in a sentence or two."""

    svg: Markup
    said: str


def similarity_plot(found: "Similarities", name: str) -> SimilarityPlot:
    """Both histograms as shares of their pairs, so that few positives show beside many negatives.

    The overlap is the sum of the lesser shares (0: apart; 1: alike). "More alike": the chance that a random positive
    pair has a higher similarity than a random negative one, half of those in one bin counted (Mann & Whitney, 1947);
    exact up to the width of a bin.
    """
    edges = np.array(found.edges)
    positives, negatives = np.array(found.positives, float), np.array(found.negatives, float)
    figure = new_figure(4.0, 2.4)
    axes = figure.subplots()
    style(axes, "share of the pairs, by similarity")
    # Hatching and an outline tell them apart without colour.
    looks = ((negatives, SYSTEMS[1], "////", "--"), (positives, SYSTEMS[0], "", "-"))
    for counts, colour, hatch, line in looks:
        if counts.sum():
            shares = counts / counts.sum()
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.5, hatch=hatch, edgecolor=BACK, lw=0)
            axes.stairs(shares, edges, color=colour, lw=1.4, ls=line)
            middle = _median(counts, edges)
            axes.axvline(middle, color=INK, lw=0.8, ls=line, ymax=0.96)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("similarity; upright lines: medians", fontsize=8, color=MUTED)
    said = _said(positives, negatives, edges)
    return SimilarityPlot(svg_of(figure, name, f"Two histograms of similarities. {said}"), said)


def overlap(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> tuple[float, float]:
    """Share that two histograms `(B,)` of the same bins have in common, and how often a positive is more alike."""
    p_B, n_B = positives / positives.sum(), negatives / negatives.sum()
    below_B = np.cumsum(n_B) - n_B
    return float(np.minimum(p_B, n_B).sum()), float((p_B * (below_B + n_B / 2)).sum())


def _said(positives: NDArray[np.float64], negatives: NDArray[np.float64], edges: NDArray[np.float64]) -> str:
    parts = []
    for counts, name in ((positives, "positive"), (negatives, "negative")):
        many = f"{int(counts.sum()):,} {name} pairs" if counts.sum() else f"no {name} pairs"
        parts.append(f"{many}, median {figure_text(_median(counts, edges))}" if counts.sum() else many)
    told = "; ".join(parts).capitalize() + "."
    if not (positives.sum() and negatives.sum()):
        return told
    shared, more = overlap(positives, negatives)
    word = "hardly overlap" if shared < 0.05 else "overlap in part" if shared < 0.5 else "overlap for the most part"
    return (
        f"{told} They {word} ({shared:.0%}); a positive pair is more alike than a negative one in {more:.1%} of cases."
    )


def _median(counts: NDArray[np.float64], edges: NDArray[np.float64]) -> float:
    """Of a histogram, evenly spread within a bin."""
    below = np.cumsum(counts)
    at = int(np.searchsorted(below, counts.sum() / 2))
    inside = (counts.sum() / 2 - (below[at] - counts[at])) / counts[at]
    return float(edges[at] + inside * (edges[at + 1] - edges[at]))
