"""Rows of a corpus to vectors: read, decoded and encoded in one process; rows that cannot be are set aside."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb import storage
from rayemb.data.config import EmbedConfig, EmbedWhat
from rayemb.data.corpus import CorpusError, RowGroup, open_shard, read_row_group
from rayemb.data.embeddings import VECTOR
from rayemb.models import ImageError, ImageLimits, Model, decode_image, image_tensor

if TYPE_CHECKING:
    import ray.data

GROUPS_PER_TASK = 8
# Batches of texts that are sorted by length together: inside one batch alone there would be nothing to gain.
LENGTH_WINDOW = 16


@dataclass(frozen=True)
class Span:
    """Row groups `start .. stop-1` of one file, `rows` in all; no groups if the file's footer cannot be read."""

    file: str
    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class BadRows:
    """What was set aside: one row, or `rows` rows of a row group (`row` is None) or of a file (both are)."""

    source: str
    row_group: int | None
    row: int | None
    rows: int
    id: str | None
    reason: str
    what: str


SetAside = Callable[[BadRows], None]


@dataclass(frozen=True)
class _Part:
    rows: pa.Table  # the columns to keep, and `id`
    inputs: list[Any]  # what the encoder takes: pixels (3, S, S) uint8, or a text
    places: list[tuple[str, int, int]]  # file, row group, row in it

    def __getitem__(self, part: slice) -> "_Part":
        return _Part(self.rows[part], self.inputs[part], self.places[part])

    def where(self, good: NDArray[np.bool_]) -> "_Part":
        kept = np.flatnonzero(good)
        rows = self.rows.filter(pa.array(good))
        return _Part(rows, [self.inputs[i] for i in kept], [self.places[i] for i in kept])

    def bad(self, row: int, reason: str, what: str) -> BadRows:
        return BadRows(*self.places[row], 1, self.rows["id"][row].as_py(), reason, what)


class RowEncoder:
    """The rows of row groups as tables with a vector column per model, in order, in batches that the rows decide.

    Reading and decoding (on as many threads as the worker has CPUs) go one batch ahead of the encoder. All models
    see the same pixels of side `image_size`.
    """

    def __init__(
        self, model_uris: Sequence[str], config: EmbedConfig, *, what: EmbedWhat, image_size: int, limits: ImageLimits
    ) -> None:
        import torch

        threads = max(1, int(config.cpus_per_worker))
        torch.set_num_threads(threads)
        self.models = [Model.load(uri) for uri in model_uris]
        for model in self.models:
            model.network.to("cuda" if config.gpus_per_worker else "cpu")
        self.what, self.image_size, self.limits = what, image_size, limits
        self.batch_size = config.batch_size
        self.decoders = ThreadPoolExecutor(threads) if threads > 1 else None

    def encode(self, spans: Iterable[Span], keep: Sequence[str], set_aside: SetAside) -> Iterator[pa.Table]:
        """Tables of the `keep` columns and `vector`, `vector_1`, ...; `set_aside` is told of every row left out."""
        window = self.batch_size * (1 if self.what == "image" else LENGTH_WINDOW)
        for part in _ahead(_batched(self._prepared(spans, keep, set_aside), window)):
            table = self._with_vectors(part, set_aside)
            if len(table):
                yield table.select([*keep, *(_vector(number) for number in range(len(self.models)))])

    def _prepared(self, spans: Iterable[Span], keep: Sequence[str], set_aside: SetAside) -> Iterator[_Part]:
        columns = list(dict.fromkeys(["id", self.what, *keep]))
        for file, group, table in _read(spans, columns, set_aside):
            values = table[self.what].to_pylist()
            prepare = self._pixels if self.what == "image" else self._text
            inputs: list[Any] = list(self.decoders.map(prepare, values) if self.decoders else map(prepare, values))
            rows = table.select(list(dict.fromkeys(["id", *keep])))
            part = _Part(rows, inputs, [(file, group, row) for row in range(len(inputs))])
            good = np.array([not isinstance(each, _Refused) for each in inputs], dtype=bool)
            for row in np.flatnonzero(~good):
                set_aside(part.bad(int(row), inputs[row].reason, inputs[row].what))
            yield part if good.all() else part.where(good)

    def _pixels(self, data: bytes | None) -> "NDArray[np.uint8] | _Refused":
        if data is None:
            return _Refused("missing_image", "there is no image")
        try:
            return image_tensor(decode_image(data, self.limits), self.image_size)
        except ImageError as error:
            return _Refused(f"{error.reason}_image", error.what)

    def _text(self, text: str | None) -> "str | _Refused":
        return text if text and text.strip() else _Refused(f"empty_{self.what}", f"the {self.what} is empty")

    def _with_vectors(self, part: _Part, set_aside: SetAside) -> pa.Table:
        table, refused = part.rows, {}
        for number, model in enumerate(self.models):
            vectors, problems = encode_rows(partial(self._vectors, model), part.inputs)
            refused.update(problems)
            table = table.append_column(
                _vector(number), pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), model.dim)
            )
        for row, (reason, what) in refused.items():
            set_aside(part.bad(row, reason, what))
        return table.filter(pa.array([row not in refused for row in range(len(table))])) if refused else table

    def _vectors(self, model: Model, inputs: list[Any]) -> NDArray[np.float32]:
        if self.what == "image":
            return model.embed_pixels(np.stack(inputs), self.batch_size)
        order = by_length(inputs)
        vectors = np.empty((len(inputs), model.dim), np.float32)
        kind: Literal["query", "text"] = "query" if self.what == "query" else "text"
        vectors[order] = model.embed_texts([inputs[i] for i in order], self.batch_size, kind=kind)
        return vectors


@dataclass(frozen=True)
class _Refused:
    reason: str
    what: str


def encode_rows(
    encode: Callable[[list[Any]], NDArray[np.float32]], inputs: list[Any]
) -> tuple[NDArray[np.float32], dict[int, tuple[str, str]]]:
    """Vectors `(N, D)` of the inputs, and (reason, sentence) for each row that cannot be encoded (its vector is void).

    A row is refused if the encoder raises for it alone, or gives a vector that is not finite. If the encoder raises
    for every one of several rows, the fault is its own: that error is raised.
    """
    refused: dict[int, tuple[str, str]] = {}
    errors: list[Exception] = []

    def part(start: int, stop: int) -> list[NDArray[np.float32]]:
        try:
            return [encode(inputs[start:stop])]
        except Exception as error:  # whatever an encoder raises; bisected down to the rows that make it
            if stop - start == 1:
                refused[start] = ("not_encodable", f"the encoder refuses it ({' '.join(str(error).split())[:200]})")
                errors.append(error)
                return []
        middle = (start + stop) // 2
        return part(start, middle) + part(middle, stop)

    pieces = part(0, len(inputs))
    if len(errors) == len(inputs) > 1:
        raise errors[0]
    good = np.array([row not in refused for row in range(len(inputs))], dtype=bool)
    dim = pieces[0].shape[1] if pieces else 1
    vectors = np.zeros((len(inputs), dim), np.float32)
    if pieces:
        vectors[good] = np.concatenate(pieces)
    for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
        refused[int(row)] = ("not_finite", "its vector is not finite")
    return vectors, refused


def by_length(texts: Sequence[str]) -> NDArray[np.int64]:
    """The order that puts texts of a length side by side, so that consecutive batches need little padding."""
    return np.argsort([len(text) for text in texts], kind="stable")


def encode_images(
    groups: dict[str, list[RowGroup]],
    model_uris: Sequence[str],
    config: EmbedConfig,
    *,
    keep: Sequence[str],
    image_size: int,
    limits: ImageLimits,
) -> "ray.data.Dataset":
    """A lazy dataset of `keep` columns (`split` among them if named) and one vector column per model.

    The columns are `vector`, `vector_1`, ... in the order of `model_uris`; all models see the same pixels of side
    `image_size`. Rows come in the order of `groups`. A row that cannot be encoded raises CorpusError.
    """
    import ray.data  # half a second and 80 MB, which training's workers and decoders do without

    units = [
        {"unit": json.dumps({"split": split, "groups": [asdict(g) for g in part[at : at + GROUPS_PER_TASK]]})}
        for split, part in groups.items()
        for at in range(0, len(part), GROUPS_PER_TASK)
    ]
    rows = ray.data.from_items(units, override_num_blocks=len(units))
    rows.context.execution_options.preserve_order = True
    return rows.map_batches(
        _UnitEncoder,
        fn_constructor_args=(list(model_uris), config, list(keep), image_size, limits),
        batch_size=1,
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=config.workers),
    )


class _UnitEncoder:
    """An encoder of `encode_images`: a few row groups in, their rows and vectors out."""

    def __init__(
        self, model_uris: list[str], config: EmbedConfig, keep: list[str], image_size: int, limits: ImageLimits
    ) -> None:
        self.encoder = RowEncoder(model_uris, config, what="image", image_size=image_size, limits=limits)
        self.keep = keep

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        (unit,) = (json.loads(text) for text in batch["unit"])
        columns = [name for name in self.keep if name != "split"]
        for table in self.encoder.encode(_spans(unit["groups"]), columns, _refuse):
            if "split" in self.keep:
                table = table.append_column("split", pa.array([unit["split"]] * len(table)))
            yield table


def _refuse(bad: BadRows) -> None:
    place = "" if bad.row_group is None else f" of row group {bad.row_group}"
    row = "" if bad.row is None else f"row {bad.row}{place}: "
    raise CorpusError(f"{row}{bad.what}", where=bad.source, fix="build the corpus again")


def _spans(groups: Iterable[dict[str, Any]]) -> list[Span]:
    spans: list[Span] = []
    for group in groups:
        file, index, rows = group["file"], group["index"], group["rows"]
        if spans and (spans[-1].file, spans[-1].stop) == (file, index):
            spans[-1] = Span(file, spans[-1].start, index + 1, spans[-1].rows + rows)
        else:
            spans.append(Span(file, index, index + 1, rows))
    return spans


def _read(spans: Iterable[Span], columns: list[str], set_aside: SetAside) -> Iterator[tuple[str, int, pa.Table]]:
    """The row groups of `spans`, each file opened once; damaged ones are set aside. Raises for other trouble."""
    for span in spans:
        try:
            shard = open_shard(span.file) if span.stop > span.start else None
        except CorpusError as error:
            if not damaged(error):
                raise
            shard = None
        if shard is None:
            set_aside(BadRows(span.file, None, None, span.rows, None, "corrupt_file", "not a readable Parquet file"))
            continue
        for index in range(span.start, span.stop):
            rows = shard.metadata.row_group(index).num_rows
            try:
                table = read_row_group(RowGroup(span.file, index, rows), columns, shard)
            except CorpusError as error:
                if not damaged(error):
                    raise
                set_aside(BadRows(span.file, index, None, rows, None, "corrupt_row_group", error.what))
                continue
            yield span.file, index, table


def damaged(error: CorpusError) -> bool:
    """Whether a shard or row group cannot be read because of its content.

    A shard that is missing or of another schema, and a store that does not answer, are no reason to leave rows out.
    """
    return error.__cause__ is not None and not storage.is_store_failure(error.__cause__)


def _batched(parts: Iterable[_Part], size: int) -> Iterator[_Part]:
    """The same rows in parts of `size`, the last one shorter."""
    waiting: list[_Part] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part.inputs)
        if count >= size:
            whole, full = _joined(waiting), count - count % size
            yield from (whole[at : at + size] for at in range(0, full, size))
            waiting, count = [whole[full:count]], count - full
    if count:
        yield _joined(waiting)


def _joined(parts: list[_Part]) -> _Part:
    inputs = [each for part in parts for each in part.inputs]
    return _Part(pa.concat_tables([p.rows for p in parts]), inputs, [place for part in parts for place in part.places])


def _ahead(parts: Iterable[_Part]) -> Iterator[_Part]:
    """The same parts, each made in a thread while the caller works on the one before."""
    source = iter(parts)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, source, None)
        while (part := future.result()) is not None:
            future = thread.submit(next, source, None)
            yield part


def _vector(number: int) -> str:
    return f"{VECTOR}_{number}" if number else VECTOR
