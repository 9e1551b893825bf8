"""Whatever turns texts and pictures into vectors, as evaluations see it."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rayemb.models import Model

Side = Literal["query", "text"]


@runtime_checkable
class Encoder(Protocol):
    """A model directory, a running service, another library's model: all are judged alike."""

    @property
    def name(self) -> str:
        """What a report calls it."""

    @property
    def digest(self) -> str:
        """Of the model; empty where it is not known."""

    def texts(self, texts: Sequence[str], *, kind: Side = "text") -> NDArray[np.float32]:
        """Unit vectors `(N, D)` of texts, as queries or as documents where the model tells them apart."""

    def images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Unit vectors `(N, D)` of encoded pictures. Raises a RayembError where it takes none."""


class ModelEncoder:
    """A model in this process."""

    def __init__(self, model: Model, name: str, *, batch_size: int = 64) -> None:
        self.model, self._name, self._batch_size = model, name, batch_size

    @classmethod
    def open(cls, uri: str, *, name: str | None = None, batch_size: int = 64) -> "ModelEncoder":
        """That of a model directory. Raises ModelError."""
        return cls(Model.load(uri), name or uri.rstrip("/").rsplit("/", 1)[-1], batch_size=batch_size)

    @property
    def name(self) -> str:
        """See `Encoder.name`."""
        return self._name

    @property
    def digest(self) -> str:
        """See `Encoder.digest`."""
        return str(self.model.digest or "")

    def texts(self, texts: Sequence[str], *, kind: Side = "text") -> NDArray[np.float32]:
        """See `Encoder.texts`."""
        return self.model.embed_texts(texts, self._batch_size, kind=kind)

    def images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """See `Encoder.images`. Raises ImageError for a picture that does not decode."""
        return self.model.embed_images(images, self._batch_size)
