"""Whatever turns texts and pictures into vectors, as evaluations see it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rayemb import storage
from rayemb.data.encode import by_length
from rayemb.models import Model, ModelError
from rayemb.models.interchange import import_model

Side = Literal["query", "text"]
T = TypeVar("T")
FOREIGN = ("modules.json", "config.json")
"""By one of these a directory is known to be another library's model."""


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
    """A model in this process. Texts of a length go together, so that little of a batch is padding."""

    def __init__(self, model: Model, name: str, *, batch_size: int = 64) -> None:
        self.model, self._name, self._batch_size = model, name, batch_size

    @classmethod
    def open(cls, uri: str, *, name: str | None = None, batch_size: int = 64) -> "ModelEncoder":
        """That of a model directory. Raises ModelError."""
        return cls(Model.load(uri), name or name_of(uri), batch_size=batch_size)

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
        order = by_length(texts)
        vectors = np.empty((len(texts), self.model.dim), np.float32)
        if len(texts):
            vectors[order] = self.model.embed_texts([texts[row] for row in order], self._batch_size, kind=kind)
        return vectors

    def images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """See `Encoder.images`. Raises ImageError for a picture that does not decode."""
        return self.model.embed_images(images, self._batch_size)


class SpreadEncoder:
    """A model on several Ray actors, for large corpora: the batches of `ModelEncoder`, shared out, in their order."""

    def __init__(
        self,
        uri: str,
        name: str,
        digest: str,
        *,
        workers: int,
        cpus: float = 1.0,
        gpus: float = 0.0,
        batch_size: int = 64,
    ) -> None:
        import ray  # here alone: an evaluation in this process needs none

        self._name, self._digest, self._batch_size = name, digest, batch_size
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Replica)
        self._replicas = [actor.remote(uri, batch_size, max(1, int(cpus)), bool(gpus)) for _ in range(workers)]

    @property
    def name(self) -> str:
        """See `Encoder.name`."""
        return self._name

    @property
    def digest(self) -> str:
        """See `Encoder.digest`."""
        return self._digest

    def texts(self, texts: Sequence[str], *, kind: Side = "text") -> NDArray[np.float32]:
        """See `Encoder.texts`."""
        order = by_length(texts)
        found = self._spread([texts[row] for row in order], lambda replica, part: replica.texts.remote(part, kind))
        vectors = np.empty_like(found)
        vectors[order] = found
        return vectors

    def images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """See `Encoder.images`."""
        return self._spread(images, lambda replica, part: replica.images.remote(part))

    def close(self) -> None:
        """Gives the actors' resources back."""
        import ray

        for replica in self._replicas:
            ray.kill(replica)
        self._replicas = []

    def _spread(self, inputs: Sequence[T], ask: Callable[[Any, Sequence[T]], Any]) -> NDArray[np.float32]:
        from ray.util import ActorPool

        # A few batches a call: whoever is done takes the next ones.
        size = 4 * self._batch_size
        parts = [inputs[at : at + size] for at in range(0, len(inputs), size)] or [inputs]
        found: list[NDArray[np.float32]] = list(ActorPool(self._replicas).map(ask, parts))
        return np.concatenate(found)


class _Replica:
    def __init__(self, uri: str, batch_size: int, threads: int, gpu: bool) -> None:
        import torch

        torch.set_num_threads(threads)
        self.model, self.batch_size = Model.load(uri), batch_size
        self.model.network.to("cuda" if gpu else "cpu")

    def texts(self, texts: list[str], kind: Side) -> NDArray[np.float32]:
        return self.model.embed_texts(texts, self.batch_size, kind=kind)

    def images(self, images: list[bytes]) -> NDArray[np.float32]:
        return self.model.embed_images(images, self.batch_size)


def name_of(uri: str) -> str:
    """What a report calls the model there, if nobody says otherwise: the last part of its address."""
    return uri.rstrip("/").rsplit("/", 1)[-1] or uri


def untrained(model: Model) -> Model:
    """The network that the model's training began with: its architecture, tokenizer and seed. Raises ModelError."""
    return Model.create(model.network.config, model.tokenizer, int(model.info.get("seed", 0)))


@contextmanager
def model_directory(uri: str) -> Iterator[str]:
    """A model directory of ours for that at `uri`: itself, or a copy of another library's, imported for as long.

    Raises ModelError if nothing of either kind lies there.
    """
    uri = storage.normalise(uri)
    ours = storage.exists(storage.join(uri, "rayemb.json"))
    if ours or not any(storage.exists(storage.join(uri, name)) for name in FOREIGN):
        yield uri  # opening it says what is wrong
        return
    with tempfile.TemporaryDirectory(prefix="rayemb-") as folder:
        imported = storage.join(folder, "model")
        try:
            import_model(uri, imported)
        except ModelError as error:
            raise ModelError(error.what, where=error.where or uri, fix=error.fix) from error
        yield imported
