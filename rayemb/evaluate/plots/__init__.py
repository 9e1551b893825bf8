"""What the pages of reports show: one file a picture, each with the words that say the same."""

from rayemb.evaluate.plots.bars import bars
from rayemb.evaluate.plots.confusion import ConfusionTable, confusion_table
from rayemb.evaluate.plots.curves import CurvePlot, curve_plot
from rayemb.evaluate.plots.forest import forest
from rayemb.evaluate.plots.pictures import THUMBNAIL, picture
from rayemb.evaluate.plots.similarities import SimilarityPlot, similarity_plot
from rayemb.evaluate.plots.space import LOOKS, Budget, SpaceView, space_view
from rayemb.evaluate.plots.training import training_plot

__all__ = [
    "LOOKS",
    "THUMBNAIL",
    "Budget",
    "ConfusionTable",
    "CurvePlot",
    "SimilarityPlot",
    "SpaceView",
    "bars",
    "confusion_table",
    "curve_plot",
    "forest",
    "picture",
    "similarity_plot",
    "space_view",
    "training_plot",
]
