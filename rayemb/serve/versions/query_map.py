"""Queries of one model, asked of an index of another: `q' = normalise(W q + b)`.

For a new model whose space is, up to a rotation or an affine map, that of the old one: it is served at once, while the
corpus is embedded anew. The map is estimated elsewhere, from texts or images that both models embedded (orthogonal
Procrustes, least squares); here it is applied, to the queries alone. A file without both models' digests is refused,
so that no map is ever applied between models that it was not made for.

Shape suffixes: N queries, Q dimensions of the query model, D of the index's.
"""

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rayemb import storage
from rayemb.serve.errors import ServeError
from rayemb.serve.versions.catalog import QueryMapRef

Floats = NDArray[np.float32]
_LEAST_NORM = 1e-12


class QueryMap:
    """A map of unit vectors of the model `source` into the space of the model `target`, both by digest."""

    def __init__(self, weight: Floats, bias: Floats, source: str, target: str) -> None:
        self.weight_DQ, self.bias_D, self.source, self.target = weight, bias, source, target

    @property
    def dims(self) -> tuple[int, int]:
        """Dimensions that it takes and gives."""
        return self.weight_DQ.shape[1], self.weight_DQ.shape[0]

    def __call__(self, x_NQ: Floats) -> Floats:
        """Unit vectors `(N, D)` of unit vectors `(N, Q)`, float32."""
        mapped = np.asarray(x_NQ, np.float32) @ self.weight_DQ.T + self.bias_D
        norms = np.linalg.norm(mapped, axis=-1, keepdims=True)
        return np.ascontiguousarray(mapped / np.maximum(norms, _LEAST_NORM), np.float32)

    @classmethod
    def load(cls, ref: QueryMapRef) -> "QueryMap":
        """The map of a catalog entry. Raises ServeError if the file is missing, altered or no such map."""
        try:
            data = storage.read_bytes(ref.uri)
        except storage.StorageError as error:
            raise ServeError(f"the query map cannot be read ({error.what})", where=ref.uri) from error
        found = storage.sha256_bytes(data)
        if found != ref.sha256:
            told = f"the checksum differs (sha256 {found[:12]}..., the catalog says {ref.sha256[:12]}...)"
            raise ServeError(told, where=ref.uri, fix="restore the file, or add the version again")
        try:
            tensors, about = load_tensors(data), _metadata(data)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ServeError(f"this is no safetensors file ({error})", where=ref.uri) from error
        return cls._checked(tensors, about, ref.uri)

    @classmethod
    def _checked(cls, tensors: dict[str, NDArray[np.generic]], about: dict[str, str], where: str) -> "QueryMap":
        if not about.get("source") or not about.get("target"):
            raise ServeError("it does not say between which models it maps", where=where, fix="write it with `save`")
        weight = tensors.get("weight")
        if weight is None or weight.ndim != 2 or not set(tensors) <= {"weight", "bias"}:
            raise ServeError(f"it holds {sorted(tensors)}, not weight (D, Q) and bias (D,)", where=where)
        bias = tensors.get("bias", np.zeros(len(weight), np.float32))
        if bias.shape != (len(weight),):
            raise ServeError(f"bias has shape {bias.shape} and weight {weight.shape}", where=where)
        as_floats = weight.astype(np.float32), bias.astype(np.float32)
        if not all(np.isfinite(part).all() for part in as_floats):
            raise ServeError("it holds NaN or infinity", where=where)
        return cls(*as_floats, about["source"], about["target"])

    def save(self, uri: str) -> QueryMapRef:
        """Writes the map to a safetensors file, and gives what a catalog entry says of it."""
        about = {"source": self.source, "target": self.target}
        data = save_tensors({"weight": self.weight_DQ, "bias": self.bias_D}, about)
        storage.write_bytes(uri, data)
        return QueryMapRef(uri=storage.normalise(uri), sha256=storage.sha256_bytes(data))


def _metadata(data: bytes) -> dict[str, str]:
    # The header of the format: its length in 8 bytes, then JSON with the metadata under one name.
    import json

    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return found
