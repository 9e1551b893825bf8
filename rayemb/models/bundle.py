"""The model artefact: a directory with weights, tokenizer and `rayemb.json`, whose digest names the model."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from rayemb import __version__, storage
from rayemb.config import ConfigError, from_mapping
from rayemb.errors import RayembError
from rayemb.models.images import ImageLimits, decode_image, image_tensor
from rayemb.models.tokenizer import TextTokenizer
from rayemb.models.two_tower import TwoTower, TwoTowerConfig

FORMAT = 1
WEIGHTS, TOKENIZER, MANIFEST, CARD = "model.safetensors", "tokenizer.json", "rayemb.json", "README.md"


class ModelError(RayembError):
    """A model directory that is missing, incomplete, or not what its manifest says."""


class Model:
    """Towers and tokenizer together: texts and images in, unit vectors out.

    `digest` (hex) names the model: it covers weights, tokenizer and configuration; None until saved or loaded.
    `info` holds what the trainer recorded (loss, temperature, training data digest, ...).
    """

    def __init__(
        self, network: TwoTower, tokenizer: TextTokenizer, info: dict[str, Any] | None = None, digest: str | None = None
    ) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.info = info or {}
        self.digest = digest

    @classmethod
    def create(cls, config: TwoTowerConfig, tokenizer: TextTokenizer, seed: int) -> "Model":
        """An untrained model; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(TwoTower(config, tokenizer.vocab_size), tokenizer)

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self.network.config.dim

    # -- encoding ------------------------------------------------------------------------------------------

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> NDArray[np.float32]:
        """Unit vectors `(N, D)` float32 of `texts`."""
        return self._embed(
            (torch.from_numpy(self.tokenizer(texts[i : i + batch_size])) for i in range(0, len(texts), batch_size)),
            self.network.encode_text,
        )

    def embed_images(
        self, images: Sequence[bytes | Image.Image], batch_size: int = 256, limits: ImageLimits | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors `(N, D)` float32 of encoded images (or RGB pictures). Raises ImageError for a bad one."""

        def batches() -> Iterable[torch.Tensor]:
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                yield torch.from_numpy(np.stack([self.pixels(image, limits) for image in part]))

        return self._embed(batches(), self.network.encode_image)

    def embed_pixels(self, pixels: NDArray[np.uint8], batch_size: int = 256) -> NDArray[np.float32]:
        """Unit vectors `(N, D)` float32 of prepared pixels `(N, 3, S, S)` uint8."""
        return self._embed(
            (torch.from_numpy(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)),
            self.network.encode_image,
        )

    def pixels(self, image: bytes | Image.Image, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
        """What the image tower sees of one image: `(3, S, S)` uint8."""
        picture = decode_image(image, limits) if isinstance(image, bytes) else image
        return image_tensor(picture, self.network.config.image.image_size)

    def _embed(self, batches: Iterable[torch.Tensor], encode: Any) -> NDArray[np.float32]:
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            parts = [encode(batch.to(device)).float().cpu().numpy() for batch in batches]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

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
        storage.write_bytes(storage.join(uri, CARD), _card(manifest, self.digest).encode())
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


def _card(manifest: dict[str, Any], digest: str) -> str:
    info = json.dumps({k: v for k, v in manifest.items() if k not in ("files",)}, indent=2, ensure_ascii=False)
    return (
        "# A rayemb two-tower model\n\n"
        f"Digest `{digest}`. Images and texts become unit vectors of {manifest['dim']} dimensions; compare them by "
        'inner product.\n\n```python\nfrom rayemb.models import Model\n\nmodel = Model.load("path/to/this/folder")\n'
        'model.embed_texts(["red heart"])       # (1, D) float32\n```\n\n'
        f"```json\n{info}\n```\n"
    )
