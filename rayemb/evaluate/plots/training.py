"""The training that a model came from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from rayemb.evaluate.page import MUTED, SYSTEMS, figure_text, new_figure, style, svg_of

if TYPE_CHECKING:
    from rayemb.evaluate.report import TrainingPoint


def training_plot(points: "Sequence[TrainingPoint]") -> Markup:
    """Loss over steps; beside it the temperature, where it was recorded."""
    steps = np.array([point.step for point in points])
    losses = np.array([point.loss for point in points])
    warm = [(point.step, point.temperature) for point in points if point.temperature is not None]
    figure = new_figure(9.6, 2.9, wspace=0.06)
    panels = figure.subplots(1, 2 if warm else 1, width_ratios=[2, 1] if warm else [1], squeeze=False)[0]
    style(panels[0], "loss")
    marker = "o" if len(points) == 1 else ""
    window = len(points) // 40
    if window > 1:
        panels[0].plot(steps, losses, color=SYSTEMS[0], lw=0.7, alpha=0.35)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        panels[0].plot(steps[window - 1 :], smooth, color=SYSTEMS[0], lw=1.8)
        panels[0].set_title(f"bold: mean of the last {window} records", loc="right", fontsize=7.5, color=MUTED)
    else:
        panels[0].plot(steps, losses, color=SYSTEMS[0], lw=1.8, marker=marker)
    if warm:
        style(panels[1], "temperature")
        panels[1].plot(*zip(*warm, strict=True), color=SYSTEMS[2], lw=1.8, marker=marker)
    for axes in panels:
        axes.set_xlabel("step", fontsize=8, color=MUTED)
    said = f"Loss from {figure_text(losses[0])} at step {steps[0]} to {figure_text(losses[-1])} at step {steps[-1]}."
    if warm:
        said += f" Temperature from {figure_text(warm[0][1])} to {figure_text(warm[-1][1])}."
    return svg_of(figure, "training", f"Line chart. {said}")
