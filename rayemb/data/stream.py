"""The training stream: rows in an order that is a function of (seed, epoch, position) only, decoded on Ray Data."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rayemb.data.corpus import Corpus, CorpusError, RowGroup, read_row_group
from rayemb.data.keys import keys_of
from rayemb.models import ImageLimits, TextTokenizer, decode_image, image_tensor

GROUPS_PER_UNIT = 16  # row groups that are read and shuffled together


@dataclass(frozen=True)
class Unit:
    """A handful of row groups that one task reads and shuffles together; `first` is its position in the stream."""

    groups: tuple[RowGroup, ...]
    epoch: int
    number: int
    first: int
    rows: int

    def to_json(self) -> str:
        """The unit as a row of a Ray dataset."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        """The unit again."""
        fields = json.loads(text)
        return cls(**{**fields, "groups": tuple(RowGroup(**group) for group in fields["groups"])})


def plan(groups: list[RowGroup], *, seed: int, start: int, stop: int) -> Iterator[Unit]:
    """The units that hold rows `start .. stop-1` of the endless stream, in order.

    Each epoch permutes the row groups anew; positions before `start` are skipped by whole units, without reading.
    """
    per_epoch = sum(group.rows for group in groups)
    if not per_epoch:
        raise CorpusError("the split has no rows", where="train.split")
    if start >= stop:  # a run that is at its end asks for nothing
        return
    epoch = start // per_epoch
    position = epoch * per_epoch
    while position < stop:
        order = np.random.default_rng([seed, epoch]).permutation(len(groups))
        for number, at in enumerate(range(0, len(order), GROUPS_PER_UNIT)):
            chosen = tuple(groups[i] for i in order[at : at + GROUPS_PER_UNIT])
            rows = sum(group.rows for group in chosen)
            if position + rows > start and position < stop:
                yield Unit(chosen, epoch, number, position, rows)
            position += rows
        epoch += 1


@dataclass(frozen=True)
class Decoder:
    """Turns a unit into training columns; the same unit gives the same rows in every process."""

    tokenizer: TextTokenizer
    image_size: int
    seed: int
    start: int
    stop: int
    main_caption: float
    limits: ImageLimits

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """`pixels` (n, 3, S, S) uint8, `tokens` (n, L) int64, `group` (n,) int64, `position` (n,) int64."""
        columns = ("image", "text", "texts", "concept")
        table = pa.concat_tables([read_row_group(group, columns) for group in unit.groups])
        rng = np.random.default_rng([self.seed, unit.epoch, unit.number])
        order, draws = rng.permutation(unit.rows), rng.random(unit.rows)
        positions = unit.first + np.arange(unit.rows)
        wanted = (positions >= self.start) & (positions < self.stop)
        rows = table.take(pa.array(order[wanted])).to_pylist()
        # One caption of each image, drawn anew each epoch.
        texts = [_caption(row, draw, self.main_caption) for row, draw in zip(rows, draws[wanted], strict=True)]
        return {
            "pixels": np.stack([image_tensor(decode_image(r["image"], self.limits), self.image_size) for r in rows]),
            "tokens": self.tokenizer(texts, pad_to=self.tokenizer.max_length),
            "group": keys_of([r["concept"] for r in rows]),
            "position": positions[wanted],
        }


def train_stream(
    corpus: Corpus,
    split: str,
    *,
    tokenizer: TextTokenizer,
    image_size: int,
    seed: int,
    start: int,
    stop: int,
    block_rows: int,
    fraction: float = 1.0,
    main_caption: float = 0.5,
    decode_cpus: float = 0.5,
) -> ray.data.Dataset:
    """Rows `start .. stop-1` of the stream as a lazy Ray dataset, in order, in blocks of `block_rows`.

    With `block_rows` = the rows of one rank in one step, the blocks that Ray Train deals out to W ranks make up
    the global batches in order, whatever W is. `fraction` < 1 keeps only that share of the row groups;
    `main_caption` is the probability that an image comes with its `text` rather than with any of its `texts`.
    """
    decoder = Decoder(tokenizer, image_size, seed, start, stop, main_caption, corpus.image_limits)
    groups = corpus.row_groups(split)
    units = list(plan(groups[: max(1, round(len(groups) * fraction))], seed=seed, start=start, stop=stop))

    def read(batch: dict[str, Any]) -> dict[str, Any]:
        (unit,) = batch["unit"]
        return decoder(Unit.from_json(unit))

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    dataset = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=max(1, len(units)))
    # Strict: otherwise the rest of every unit is a short block, and two ranks' batches drift apart after the first.
    return dataset.map_batches(read, batch_size=1, num_cpus=decode_cpus).repartition(
        target_num_rows_per_block=block_rows, strict=True
    )


def _caption(row: dict[str, Any], draw: float, main: float) -> str:
    """The main caption for a `draw` in [0, main), else one of all captions, each equally likely."""
    if draw < main or not row["texts"]:
        return str(row["text"])
    return str(row["texts"][int((draw - main) / (1 - main) * len(row["texts"]))])
