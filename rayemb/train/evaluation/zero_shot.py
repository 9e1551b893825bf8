"""Classification of images by the names of their concepts, in sentences."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from rayemb.data.corpus import read_row_group
from rayemb.data.decode import Member
from rayemb.errors import RayembError
from rayemb.evaluate.config import Templates
from rayemb.evaluate.diagnostics import alignment
from rayemb.evaluate.metrics import class_vectors, fill_templates, ranks, recall_at
from rayemb.train.evaluation.base import Encoder, Found, Rows, Task, TaskConfig, block_of
from rayemb.train.evaluation.retrieval import CONCEPT


class ZeroShotConfig(TaskConfig):
    """Zero-shot accuracy of images among all concepts of the split (Radford et al., 2021).

    A concept's vector is the normalised mean of the unit vectors of its templates. Ties count against the model.
    """

    kind: Literal["zero_shot"] = "zero_shot"
    templates: Templates = Field(("{}",), min_length=1, description="texts with {} for the name of the concept")
    ks: tuple[int, ...] = Field((1, 5), min_length=1, description="cut-offs")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what it reports."""
        return tuple(f"accuracy@{k}" for k in self.ks)

    def prepare(self, member: Member, where: str) -> "ZeroShot":
        """The task as workers get it. Reads the concepts of the split; raises RayembError without images."""
        if member.kind != "image_text":
            raise RayembError(f"zero_shot needs images, not {member.kind}", where=where, fix="name such a corpus")
        names: dict[int, str] = {}
        for group in member.groups:
            table = read_row_group(group, ["concept_key", "concept"])
            names |= dict(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
        keys = sorted(names)
        rows = min(self.rows, member.rows)
        return ZeroShot(self, member, rows, [names[key] for key in keys], np.array(keys, dtype=np.int64))


@dataclass(frozen=True)
class ZeroShot(Task):
    """Ranks share the texts of C concepts and the images: O(M C D / W) time, O((M + C) D) memory and one block."""

    config: ZeroShotConfig
    member: Member
    rows: int
    names: list[str]
    keys: NDArray[np.int64]  # (C,) sorted, of the names

    def run(self, encoder: Encoder, rows: Rows) -> Found:
        """See `Task.run`."""
        v = encoder.vectors(rows, sides="queries")
        classes, labels, mine = self._classes(encoder), v.keys[:, CONCEPT], v.mine
        part = ranks(v.queries[mine], classes, labels[mine], self.keys, block=block_of(len(classes)))
        found = encoder.everyone(torch.from_numpy(part))
        own = classes[np.searchsorted(self.keys, labels)]
        figures: dict[str, float | None] = {f"accuracy@{k}": recall_at(found, k) for k in self.config.ks}
        return Found(figures, (v.queries, classes), alignment(v.queries, own))

    def _classes(self, encoder: Encoder) -> NDArray[np.float32]:
        """The vectors of all concepts `(C, D)`, each rank's share encoded by it."""
        rank, world, templates = encoder.exchange.rank, encoder.exchange.world, self.config.templates
        share = -(-len(self.names) // world)
        # Every rank brings as many: the last ones of the last name again, cut off below.
        names = [self.names[min(n, len(self.names) - 1)] for n in range(rank * share, (rank + 1) * share)]
        texts, _ = fill_templates(names, templates)
        found = encoder.texts(texts, self.member.entry.text_prefix)[: len(self.names) * len(templates)]
        return class_vectors(found, np.repeat(np.arange(len(self.names)), len(templates)))
