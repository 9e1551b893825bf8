"""Any vision encoder of the `transformers` library as an image tower; safetensors only, no code from outside."""

import inspect
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from rayemb import storage
from rayemb.models.errors import ModelError
from rayemb.models.pretrained import CONFIG, architecture_of, read_mapping, weight_files
from rayemb.models.towers import ImageTower, ImageTowerConfig

PREPROCESSOR = "preprocessor_config.json"
Channels = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]


class PretrainedImageConfig(ImageTowerConfig):
    """A vision network of the `transformers` library (ViT, CLIP, SigLIP, DINOv2, ConvNeXt, ...), from a directory.

    Pictures are fitted whole into the square, not cropped as the library's own preprocessing may do.
    """

    name: Literal["transformers"] = "transformers"
    source: str | None = Field(
        None,
        description="directory, path or URI, with config.json and safetensors; of CLIP's two towers that of images",
    )
    architecture: dict[str, Any] | None = Field(
        None, description="the network's config as in config.json; null: that of the source"
    )
    image_size: int = Field(
        224, ge=8, description="side of the square input, in pixels; positions are interpolated if it is not its own"
    )
    features: Literal["cls", "mean", "pooled"] = Field(
        "cls",
        description="the state of the class token, the mean over the patches, or what the network itself pools (CLIP "
        "and SigLIP: pooled)",
    )
    mean: Channels | None = Field(
        None, description="of each colour, 0 to 1, taken off; null: as the source says, or 0.5 each"
    )
    std: tuple[Positive, Positive, Positive] | None = Field(
        None, description="of each colour, divided by; null: as the source says, or 0.5 each"
    )

    @model_validator(mode="after")
    def _resolvable(self) -> "PretrainedImageConfig":
        if self.source is None and self.architecture is None:
            raise ValueError("give a source, or an architecture for random weights")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("architecture has no model_type")
        return self

    def resolved(self) -> "PretrainedImageConfig":
        """The same with its architecture and colours said. Raises ModelError if the source cannot be read."""
        if self.architecture is not None and self.mean is not None and self.std is not None:
            return self
        source, said = self.source, {}
        if source is not None and storage.exists(storage.join(source, PREPROCESSOR)):
            said = read_mapping(source, PREPROCESSOR)
        network = self.architecture or read_mapping(str(source), CONFIG)
        if "vision_config" in network:
            kind = f"{network['model_type']}_vision_model"
            network = {"model_type": kind, **network["vision_config"]}
        update: dict[str, Any] = {"architecture": network}
        for name in ("mean", "std"):
            update[name] = getattr(self, name) or tuple(said.get(f"image_{name}") or (0.5, 0.5, 0.5))
        return self.model_copy(update=update)

    def build(self) -> ImageTower:
        """The tower, with random weights. Raises ModelError for an architecture that is unknown or does not fit."""
        return PretrainedImages(self.resolved())

    def load_weights(self, tower: ImageTower) -> None:
        """Puts the source's weights into the tower. Raises ModelError if some are missing."""
        if self.source is not None and isinstance(tower, PretrainedImages):
            tower.load(self.source)


class PretrainedImages(ImageTower):
    """Pixels through a vision network of `transformers`."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: PretrainedImageConfig) -> None:
        super().__init__()
        self.image_size, self._kind = config.image_size, config.features
        self.model = _build(dict(config.architecture or {}))
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)
        own = getattr(self.model.config, "image_size", None)
        interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self._more = {"interpolate_pos_encoding": True} if interpolates and own != config.image_size else {}
        self.features = self._probe()

    def _probe(self) -> int:
        """The features' width; freezes what they do not depend on: no gradient would ever come."""
        training = self.model.training
        try:
            with torch.enable_grad():
                found = self.eval()(torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8))
                parameters = list(self.parameters())
                gradients = torch.autograd.grad(found.sum(), parameters, allow_unused=True)
        except (ValueError, RuntimeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{type(self.model).__name__} takes no images of {self.image_size} pixels ({first})",
                where="model.image.image_size",
                fix="give the size that it was trained with",
            ) from error
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        self.train(training)
        return int(found.shape[1])

    def forward(self, pixels: Tensor) -> Tensor:
        """Features `(B, E)` in the dtype of the weights."""
        dtype = next(self.model.parameters()).dtype
        x = (pixels.to(dtype) / 255.0 - self.mean.to(dtype)) / self.std.to(dtype)
        found = self.model(pixel_values=x, **self._more)
        if self._kind == "pooled":
            if found.get("pooler_output") is None:
                raise self._without("pools nothing", "cls or mean")
            pooled: Tensor = found.pooler_output.flatten(1)
            return pooled
        states: Tensor = found.last_hidden_state
        if states.ndim == 4:
            if self._kind == "cls":
                raise self._without("has no class token", "mean or pooled")
            return states.mean((2, 3))
        patches = self._patches
        if self._kind == "cls":
            if states.shape[1] == patches:
                raise self._without("has no class token", "mean or pooled")
            return states[:, 0]
        # The last ones: before them stand a class token and registers, as many as the network has.
        return states[:, -patches:].mean(1)

    @property
    def _patches(self) -> int:
        side = self.model.config.patch_size
        return int((self.image_size // (side if isinstance(side, int) else side[0])) ** 2)

    def _without(self, what: str, instead: str) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} {what}", where="model.image.features", fix=f"model.image.features={instead}"
        )

    def load(self, source: str) -> None:
        """The weights of a directory, a whole CLIP's too. Raises ModelError if some are missing, naming them.

        By the library's own loader, which knows what the weights of a network were once called.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name in (CONFIG, *weight_files(source)):
                (Path(folder) / name).write_bytes(storage.read_bytes(storage.join(source, name)))
            try:
                network, found = type(self.model).from_pretrained(
                    folder,
                    config=self.model.config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
            except (OSError, RuntimeError, ValueError, SafetensorError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise ModelError(f"transformers cannot load its weights ({first})", where=source) from error
        # A pooler that nothing reads may well be missing.
        read = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing = sorted(set(found["missing_keys"]) & read)
        if missing:
            raise ModelError(f"{len(missing)} weights are missing, the first is {missing[0]}", where=source)
        there = {name: value for name, value in network.state_dict().items() if name not in found["missing_keys"]}
        self.model.load_state_dict(self.model.state_dict() | there)


def _build(architecture: dict[str, Any]) -> Any:
    """A vision network from the content of a config.json, with random weights."""
    import transformers

    kind = str(architecture.pop("model_type"))
    try:
        config = architecture_of(kind, architecture)
        # Unsaid, what is fastest of what the network has: some have no attention at all.
        model: nn.Module = transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, ImportError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(
            f"transformers cannot build a {kind!r} as an image tower ({first})", where="model.image"
        ) from error
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"a {kind!r} takes no images", where="model.image")
    return model
