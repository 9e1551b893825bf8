"""The model artefact: a directory with weights, tokenizer and `rayemb.json`, whose digest names the model."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rayemb import __version__, storage
from rayemb.config import ConfigError, from_mapping
from rayemb.models.card import Facts, card
from rayemb.models.context import ContextConfig, ContextMode
from rayemb.models.cutting import cut
from rayemb.models.errors import ModelError
from rayemb.models.images import ImageLimits, decode_image, image_tensor
from rayemb.models.tokenizer import TextTokenizer
from rayemb.models.two_tower import TwoTower, TwoTowerConfig

T = TypeVar("T")
FORMAT = 1
WEIGHTS, TOKENIZER, MANIFEST, CARD = "model.safetensors", "tokenizer.json", "rayemb.json", "README.md"


class Model:
    """Towers and tokenizer together: texts and images in, unit vectors out.

    `digest` (hex) names the model: it covers weights, tokenizer and configuration; None until saved or loaded.
    `info` holds what the trainer recorded (loss, temperature, training data digest, ...).
    """

    def __init__(
        self, network: TwoTower, tokenizer: TextTokenizer, info: dict[str, Any] | None = None, digest: str | None = None
    ) -> None:
        self.network = network.eval()
        network.eval()  # a trainer says otherwise; pretrained networks have dropout
        self.tokenizer = tokenizer
        self.info = info or {}
        self.digest = digest

    @classmethod
    def create(cls, config: TwoTowerConfig, tokenizer: TextTokenizer, seed: int) -> "Model":
        """A model to be trained: its random weights by the seed, pretrained ones from where the config says.

        Raises ModelError if parts do not fit together, or pretrained weights cannot be had.
        """
        config = config.resolved()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = TwoTower(config, tokenizer.vocab_size)
        config.text.load_weights(network.text)
        if config.image is not None and network.image is not None:
            config.image.load_weights(network.image)
        for prompt in (config.prompts.query, config.prompts.text):
            if len(tokenizer([prompt])[0]) >= tokenizer.max_length:
                raise ModelError(
                    f"the prompt {prompt[:40]!r} leaves no room for a text in {tokenizer.max_length} tokens",
                    where="model.prompts",
                    fix="a shorter prompt, or a larger model.tokenizer.max_length",
                )
        return cls(network, tokenizer)

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self.network.config.dim

    @property
    def facts(self) -> Facts:
        """What a model card tells of it."""
        return Facts(self.network.config, self.info, self.digest)

    # -- encoding ------------------------------------------------------------------------------------------

    def embed_texts(
        self, texts: Sequence[str], batch_size: int = 256, *, kind: Literal["query", "text"] = "text"
    ) -> NDArray[np.float32]:
        """Unit vectors `(N, D)` float32 of `texts`, behind the model's prompt of that kind if it has one."""
        prompts = self.network.config.prompts
        prompt = prompts.query if kind == "query" else prompts.text

        def encode(part: Sequence[str]) -> Tensor:
            ids, skips = (
                torch.from_numpy(array).to(self._device) for array in self.tokenizer.with_prompt(part, prompt)
            )
            return self.network.encode_text(ids, None if prompts.pooled else skips)

        return self._embed(encode, (texts[i : i + batch_size] for i in range(0, len(texts), batch_size)))

    def embed_images(
        self, images: Sequence[bytes | Image.Image], batch_size: int = 256, limits: ImageLimits | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors `(N, D)` float32 of encoded images (or RGB pictures). Raises ImageError for a bad one."""

        def batches() -> Iterable[NDArray[np.uint8]]:
            for start in range(0, len(images), batch_size):
                yield np.stack([self.pixels(image, limits) for image in images[start : start + batch_size]])

        return self._embed(self._encode_pixels, batches())

    def embed_pixels(self, pixels: NDArray[np.uint8], batch_size: int = 256) -> NDArray[np.float32]:
        """Unit vectors `(N, D)` float32 of prepared pixels `(N, 3, S, S)` uint8."""
        return self._embed(self._encode_pixels, (pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size)))

    def pixels(self, image: bytes | Image.Image, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
        """What the image tower sees of one image: `(3, S, S)` uint8."""
        picture = decode_image(image, limits) if isinstance(image, bytes) else image
        size = self.network.config.image_size
        if not size:
            raise ModelError("the model has no image tower", fix="search it by text")
        return image_tensor(picture, size)

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _encode_pixels(self, pixels: NDArray[np.uint8]) -> Tensor:
        return self.network.encode_image(torch.from_numpy(pixels).to(self._device))

    def _embed(self, encode: Callable[[T], Tensor], batches: Iterable[T]) -> NDArray[np.float32]:
        with torch.inference_mode():
            parts = [encode(batch).float().cpu().numpy() for batch in batches]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def cut(self, layers: int | None = None, dim: int | None = None) -> "Model":
        """The model of the first `layers` of its text tower and the first `dim` coordinates; see `cutting.cut`."""
        return cut(self, layers, dim)

    def longer(self, max_length: int, mode: ContextMode = "grouped") -> "Model":
        """The model with texts of up to `max_length` tokens, untrained beyond those that it was made for.

        Texts within its positions have the vectors that they had. Raises ModelError for positions that cannot be told
        so (`rayemb.models.context`).
        """
        config = self.network.config.resolved()
        context = ContextConfig(mode=mode, trained=self.network.text.longest)
        update = {
            "text": config.text.model_copy(update={"context": context}),
            "tokenizer": config.tokenizer.model_copy(update={"max_length": max_length}),
        }
        network = TwoTower(config.model_copy(update=update), self.tokenizer.vocab_size)
        network.load_state_dict(self.network.state_dict())
        info = {**self.info, "longer": {"digest": self.digest, **context.model_dump()}}
        return Model(network, TextTokenizer.from_json(self.tokenizer.to_json(), max_length), info)

    # -- the artefact --------------------------------------------------------------------------------------

    def save(self, uri: str) -> str:
        """Writes the directory at `uri` (`rayemb.json` last, with the checksums of the rest); gives the digest."""
        # Cloned: safetensors refuses tensors that share storage, and DeepSpeed's are views of one flat buffer.
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}
        files = {WEIGHTS: save_tensors(weights), TOKENIZER: self.tokenizer.to_json().encode()}
        manifest = {
            "format": FORMAT,
            "rayemb": __version__,
            "towers": self.network.config.model_dump(mode="json"),
            "dim": self.dim,
            "vocab_size": self.tokenizer.vocab_size,
            "files": {name: storage.sha256_bytes(data) for name, data in files.items()},
            **self.info,
        }
        text = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
        self.digest = storage.sha256_bytes(text)
        for name, data in files.items():
            storage.write_bytes(storage.join(uri, name), data)
        storage.write_bytes(storage.join(uri, CARD), card(self.facts).encode())
        storage.write_bytes(storage.join(uri, MANIFEST), text)
        return self.digest

    @classmethod
    def load(cls, uri: str) -> "Model":
        """The model at `uri`. Raises ModelError if a file is missing or its checksum differs."""
        text, manifest = _manifest(uri)
        files = {}
        for name, expected in manifest["files"].items():
            try:
                files[name] = storage.read_bytes(storage.join(uri, name))
            except storage.StorageError as error:
                raise ModelError(
                    f"{name} is missing or unreadable: {error.what}", where=uri, fix="train or copy the model again"
                ) from error
            if storage.sha256_bytes(files[name]) != expected:
                raise ModelError(f"the checksum of {name} differs", where=uri, fix="train or copy the model again")
        try:
            config = from_mapping(TwoTowerConfig, manifest["towers"], source=storage.join(uri, MANIFEST))
            tokenizer = TextTokenizer.from_json(files[TOKENIZER].decode(), config.tokenizer.max_length)
            network = TwoTower(config, tokenizer.vocab_size)
            network.load_state_dict(load_tensors(files[WEIGHTS]))
        except (ConfigError, KeyError, RuntimeError) as error:
            raise ModelError(f"the directory does not hold the model it describes ({error})", where=uri) from error
        known = {"format", "rayemb", "towers", "dim", "vocab_size", "files"}
        info = {key: value for key, value in manifest.items() if key not in known}
        return cls(network, tokenizer, info, storage.sha256_bytes(text))


def model_digest(uri: str) -> str:
    """The digest (hex) of the model at `uri`, from its manifest alone. Raises ModelError if there is none."""
    return storage.sha256_bytes(_manifest(uri)[0])


def _manifest(uri: str) -> tuple[bytes, dict[str, Any]]:
    try:
        text = storage.read_bytes(storage.join(uri, MANIFEST))
        manifest = json.loads(text)
    except storage.MissingError as error:
        raise ModelError(f"no {MANIFEST}: there is no model here", where=uri, fix="run `rayemb train` first") from error
    except storage.StorageError as error:
        raise ModelError(f"{MANIFEST}: {error.what}", where=uri) from error
    except ValueError as error:
        raise ModelError(f"{MANIFEST} is not JSON", where=uri) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "files" not in manifest:
        raise ModelError(f"{MANIFEST} is not of format {FORMAT}", where=uri, fix="use the rayemb that wrote it")
    return text, manifest
