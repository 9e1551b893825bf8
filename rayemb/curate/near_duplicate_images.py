"""Near-duplicate images by perceptual hashes (Zauner, 2010) and multi-index Hamming search (Norouzi et al., 2012)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from pydantic import Field

from rayemb.config import Config
from rayemb.curate.base import Rows, Step, Verdicts, together
from rayemb.curate.exact_duplicates import check_content
from rayemb.curate.neighbours import Compare, group_verdicts, near_edges
from rayemb.curate.perceptual import BITS, Method, band_keys, differences, differing_bits, image_hash, thumbnail
from rayemb.data.keys import keys_of
from rayemb.models import decode_image


class ImageLikeness(Config):
    """When two images are near: perceptual hashes of few different bits, and thumbnails of few different levels.

    Measured on drawings (398 emoji, 600 icons): at the defaults 98 to 100 % of re-encoded (JPEG 50, 90) or resized
    copies are near their original, and 3.5 % of the emoji and 0.3 % of the icons are near another drawing. By the hash
    alone 18 and 20 % are. phash finds 83 to 92 % of the copies (a drawing's symmetries make its bits unsteady).
    """

    method: Method = Field("dhash", description="dhash (neighbouring pixels) or phash (frequencies; for photographs)")
    radius: int = Field(4, ge=0, le=16, description="bits of 64 in which near images may differ")
    max_difference: float | None = Field(
        8.0,
        gt=0,
        description="root mean squared difference of 12 x 12 thumbnails, in levels of 255; null: not compared",
    )

    def records(self, rows: Rows) -> ray.data.Dataset:
        """A record for each slice of each image's hash: `key`, `row`, `content` (equal for equal looks), `look`."""
        limits = rows.corpus.image_limits

        def records(table: pa.Table) -> pa.Table:
            images = [decode_image(data, limits) for data in table["image"].to_pylist()]
            hashes = np.array([image_hash(image, self.method) for image in images], np.uint64)
            thumbs = [thumbnail(image) if self.max_difference is not None else b"" for image in images]
            looks = [value.tobytes() + thumb for value, thumb in zip(hashes, thumbs, strict=True)]
            at = np.repeat(np.arange(len(hashes)), self.bands)
            return pa.table(
                {
                    "key": pa.array(band_keys(hashes, self.radius).ravel()),
                    "row": table["row"].take(pa.array(at)),
                    "content": pa.array(keys_of(looks)[at]),
                    "look": pa.array(looks, pa.binary()).take(pa.array(at)),
                }
            )

        return rows.dataset(["image"]).map_batches(records, batch_format="pyarrow", batch_size=256)

    def comparing(self, table: pa.Table) -> Compare:
        """Similarities of pairs of records: the share of equal bits, or 0 where the images are not near."""
        raw = np.frombuffer(b"".join(table["look"].to_pylist()), np.uint8).reshape(len(table), -1)
        hashes, thumbs = np.ascontiguousarray(raw[:, :8]).view(np.uint64).ravel(), raw[:, 8:]

        def compare(i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float64]:
            bits = differing_bits(hashes[i], hashes[j])
            near = bits <= self.radius
            if self.max_difference is not None:
                near[near] = differences(thumbs, i[near], j[near]) <= self.max_difference
            return np.where(near, 1 - bits / BITS, 0.0)

        return compare

    @property
    def bands(self) -> int:
        """Records that each image makes."""
        return self.radius + 1

    @property
    def threshold(self) -> float:
        """The radius as a similarity: the share of bits that are equal."""
        return 1 - self.radius / BITS


class NearDuplicateImages(Step, ImageLikeness):
    """Drops images that look like an earlier row's, directly or through others: one row of a group stays.

    Exact for its radius: hashes that differ in at most `radius` bits agree in one of `radius` + 1 slices; what agrees
    is verified by its thumbnail. O(rows) decoding, a shuffle of 470 x (radius + 1) bytes a row. Comparisons are
    quadratic in the distinct looks of a slice, which has 64 / (radius + 1) bits: a large radius on a large corpus is
    dear.
    """

    name: Literal["near_duplicate_images"] = "near_duplicate_images"

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row but the first of a group; the score is the share of bits that its nearest shares."""
        check_content("image", rows, "curate.near_duplicate_images")
        edges = together(self.records(rows), "key", self._edges, rows=rows.count * self.bands)
        return group_verdicts(edges, "near_image", describe_bits)

    def _edges(self, table: pa.Table) -> pa.Table:
        return near_edges(table, self.comparing(table), self.threshold)


def describe_bits(similarity: float) -> str:
    """The similarity in words."""
    return f"{round((1 - similarity) * BITS)} of {BITS} bits differ from the nearest of its group"
