"""Pictures with their captions, as both directions of a search see them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb.data.keys import keys_of
from rayemb.evaluate.report import Hit


@dataclass(frozen=True)
class Captioned:
    """N pictures and their T distinct captions; of one group is what shows one concept."""

    rows: list[dict[str, Any]]  # of the pictures: id, text, image
    captions: list[str]
    image_groups: NDArray[np.int64]  # (N,)
    text_groups: NDArray[np.int64]  # (T,)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "Captioned":
        """From rows with id, text, image and concept."""
        # One candidate per caption: the same caption of several pictures is one text, not several ties.
        captions = list(dict.fromkeys((row["text"], row["concept"]) for row in rows))
        return cls(
            [dict(row) for row in rows],
            [text for text, _ in captions],
            keys_of([row["concept"] for row in rows]),
            keys_of([concept for _, concept in captions]),
        )

    def hits(
        self,
        query: NDArray[np.float32],
        group: int,
        images: NDArray[np.float32],
        k: int,
        *,
        leave_out: int | None = None,
    ) -> tuple[Hit, ...]:
        """The k pictures, of vectors `images` `(N, D)`, that are nearest to a query of a group."""
        scores = images @ query
        if leave_out is not None:
            scores[leave_out] = -np.inf
        best = np.argsort(-scores, kind="stable")[: min(k, len(scores) - (leave_out is not None))]
        return tuple(
            Hit(
                caption=self.rows[i]["text"],
                image=self.rows[i]["image"],
                score=float(scores[i]),
                relevant=int(self.image_groups[i]) == group,
            )
            for i in best
        )
