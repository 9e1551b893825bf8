"""Curation on Ray Data: a corpus and an ordered list of steps in, a better corpus and the reasons why out.

A new step is one file here (a `Step` with a literal `name` and `judge`), one test of the same stem, and its config's
name in `AnyStep` below; the config, the command line and `rayemb methods` know it from there.
"""

from typing import Annotated

from pydantic import Field

from rayemb.curate.alignment import Alignment
from rayemb.curate.base import CurationError, Rows, Step, Verdicts, together, verdicts
from rayemb.curate.condense import Condense
from rayemb.curate.coreset import Coreset
from rayemb.curate.entities import Entities
from rayemb.curate.exact_duplicates import ExactDuplicates
from rayemb.curate.image_rules import ImageRules
from rayemb.curate.label_calibration import LabelCalibration
from rayemb.curate.language import Language
from rayemb.curate.leakage import Leakage
from rayemb.curate.learned_quality import LearnedQuality
from rayemb.curate.length import Length
from rayemb.curate.near_duplicate_images import NearDuplicateImages
from rayemb.curate.near_duplicate_texts import NearDuplicateTexts
from rayemb.curate.noisy_correspondence import NoisyCorrespondence
from rayemb.curate.semantic_duplicates import SemanticDuplicates
from rayemb.curate.sub_captions import SubCaptions
from rayemb.curate.text_rules import TextRules

AnyStep = Annotated[
    Alignment
    | Condense
    | Coreset
    | Entities
    | ExactDuplicates
    | ImageRules
    | LabelCalibration
    | Language
    | Leakage
    | LearnedQuality
    | Length
    | NearDuplicateImages
    | NearDuplicateTexts
    | NoisyCorrespondence
    | SemanticDuplicates
    | SubCaptions
    | TextRules,
    Field(discriminator="name"),
]

__all__ = [
    "Alignment",
    "AnyStep",
    "Condense",
    "Coreset",
    "CurationError",
    "Entities",
    "ExactDuplicates",
    "ImageRules",
    "LabelCalibration",
    "Language",
    "Leakage",
    "LearnedQuality",
    "Length",
    "NearDuplicateImages",
    "NearDuplicateTexts",
    "NoisyCorrespondence",
    "Rows",
    "SemanticDuplicates",
    "Step",
    "SubCaptions",
    "TextRules",
    "Verdicts",
    "together",
    "verdicts",
]
