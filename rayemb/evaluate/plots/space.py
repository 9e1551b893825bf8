"""A map of vectors that runs no script: a dot a vector, what it is of on hover, a colour and a shape a label."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayemb.evaluate.plots.pictures import picture

if TYPE_CHECKING:
    from rayemb.evaluate.report import Space

LOOKS = 16
"""Labels that are told apart: eight colours, as circles and as diamonds. The rest share the last, a grey ring."""
_SIDE, _QUALITY = 96, 75
_TEXT = 120
_INSET = 2  # per cent of the map: points at its edge are whole


@dataclass
class Budget:
    """What all maps of one page may still take: about a megabyte of dots and texts, and one of pictures."""

    points: int = 6_000
    pictures: int = 400
    each: int = 2_000  # points of one map


class Dot(NamedTuple):
    """One vector."""

    left: str
    top: str
    look: int
    opens: str  # where its words open, so that they stay on the map
    text: str
    picture: str | None


class SpaceView(NamedTuple):
    """What the template draws, and what it says to those who do not see it."""

    dots: list[Dot]
    legend: list[tuple[int, str, int]]  # look, label, vectors of it
    said: str


def space_view(space: "Space", budget: Budget) -> SpaceView:
    """The map within what is left of the budget, which it draws on. Raises ImageError for what does not decode."""
    count = min(len(space.x), budget.each, budget.points)
    budget.points -= count
    # By chance, not every n-th: where labels come in turn, that would leave some of them out.
    shown = np.sort(np.random.default_rng(0).choice(len(space.x), count, replace=False))
    many = Counter(space.labels)
    looks = {label: look for look, (label, _) in enumerate(many.most_common(LOOKS))}
    with_picture = [i for i in shown if space.images and space.images[i] is not None]
    step = len(with_picture) / max(1, min(len(with_picture), budget.pictures))
    chosen = {with_picture[int(place * step)] for place in range(min(len(with_picture), budget.pictures))}
    budget.pictures -= len(chosen)
    dots = [_dot(space, int(i), looks, i in chosen) for i in shown]
    legend = [(look, label, many[label]) for label, look in looks.items()]
    if len(many) > LOOKS:
        legend.append((LOOKS, f"{len(many) - LOOKS:,} more labels", len(space.labels) - sum(n for _, _, n in legend)))
    return SpaceView(dots, legend, _said(space, shown, legend))


def _dot(space: "Space", i: int, looks: dict[str, int], with_picture: bool) -> Dot:
    label = space.labels[i] if space.labels else ""
    text = space.texts[i] if space.texts else ""
    words = " · ".join(part for part in (label, text) if part)
    data = space.images[i] if with_picture else None
    return Dot(
        f"{_INSET + (100 - 2 * _INSET) * space.x[i]:.2f}",
        f"{_INSET + (100 - 2 * _INSET) * (1 - space.y[i]):.2f}",
        looks.get(label, LOOKS) if space.labels else 0,
        ("l" if space.x[i] > 0.5 else "r") + ("d" if space.y[i] > 0.5 else "u"),
        words if len(words) <= _TEXT else words[: _TEXT - 1] + "…",
        picture(data, _SIDE, _QUALITY) if data is not None else None,
    )


def _said(space: "Space", shown: np.ndarray, legend: list[tuple[int, str, int]]) -> str:
    method = {"umap": "UMAP", "pca": "principal components"}[space.method]
    parts = [f"{len(shown):,} of {space.rows:,} vectors by {method}."]
    if space.neighbours_kept is not None:
        parts.append(f"Of each point's ten nearest on the map, {space.neighbours_kept:.0%} are nearest by vector too.")
    if space.labels and len(shown) > 1:
        at = np.column_stack((space.x, space.y))[shown]
        labels = np.array(space.labels)[shown]
        away = ((at[:, None] - at[None]) ** 2).sum(axis=2)
        np.fill_diagonal(away, np.inf)
        same = float((labels == labels[away.argmin(axis=1)]).mean())
        parts.append(f"The nearest point on the map has the same label for {same:.0%} of them.")
    return " ".join(parts)
