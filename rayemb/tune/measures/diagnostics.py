"""What a trained model's space looks like, with labels or without."""

from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from rayemb.data import Corpus
from rayemb.evaluate.diagnostics import DIAGNOSTICS, Inputs, possible
from rayemb.tune.errors import TuneError
from rayemb.tune.measures.base import Measure, Trained, first_rows


class Diagnostics(Measure):
    """Diagnostics of the vectors of a split, by name (`rayemb.evaluate.diagnostics`).

    `vectors` are those of the images (or the queries), `pairs` those of their texts; the two sides of a pair are its
    `views`, as LiDAR sees them; `labels` are the concepts. Those without labels can choose where there are none.
    """

    name: Literal["diagnostics"] = "diagnostics"
    names: tuple[str, ...] = Field(("lidar", "separability", "tolerance"), min_length=1, description="which")
    split: str = Field("val", description="of the corpus")
    rows: int = Field(512, ge=2, description="the first so many rows of the split")

    @field_validator("names")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in DIAGNOSTICS:
                raise ValueError(f"there is no diagnostic {name!r}; there are {', '.join(DIAGNOSTICS)}")
        return names

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Measure.metrics`."""
        return tuple(f"{self.split}/{name}" for name in self.names)

    def measure(self, trained: Trained) -> dict[str, float]:
        """See `Measure.measure`. Raises TuneError for one that the corpus has nothing for."""
        corpus, model = Corpus.open(trained.corpus_uri), trained.model
        side = "query" if corpus.kind == "text_pair" else "image"
        rows = first_rows(corpus, self.split, self.rows, [side, "text", "concept_key"])
        texts = model.embed_texts(rows["text"])
        if side == "query":
            vectors = model.embed_texts(rows["query"], kind="query")
        else:
            vectors = model.embed_images(rows["image"])
        given = Inputs(
            vectors=vectors,
            pairs=texts,
            views=np.stack([vectors, texts], axis=1),
            labels=np.array(rows["concept_key"], np.int64),
            texts=tuple(rows["text"]),
        )
        if missing := [name for name in self.names if name not in possible(given)]:
            raise TuneError(
                f"{missing[0]} needs {', '.join(sorted(DIAGNOSTICS[missing[0]].needs - given.given()))}",
                where="tune.measures",
                fix="leave it out",
            )
        return {f"{self.split}/{name}": DIAGNOSTICS[name].run(given)[name] for name in self.names}
