"""Two towers, one space: images and texts as unit vectors that can be compared; or one tower, for texts alone."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.config import Config
from rayemb.models.convnet import ConvNetConfig
from rayemb.models.errors import ModelError
from rayemb.models.pretrained import PretrainedTextConfig
from rayemb.models.pretrained_images import PretrainedImageConfig
from rayemb.models.text import TextTransformerConfig
from rayemb.models.tokenizer import PADDING, AnyTokenizer, PretrainedTokenizerConfig, TokenizerConfig
from rayemb.models.vit import ViTConfig


def _named(default: str) -> BeforeValidator:
    # A block that only sets a width means the default tower.
    return BeforeValidator(lambda value: {"name": default, **value} if isinstance(value, dict) else value)


AnyImageTower = Annotated[
    ConvNetConfig | ViTConfig | PretrainedImageConfig, Field(discriminator="name"), _named("convnet")
]
AnyTextTower = Annotated[
    TextTransformerConfig | PretrainedTextConfig, Field(discriminator="name"), _named("transformer")
]


class PromptsConfig(Config):
    """What is put before texts, in training and whenever the model is used: instructions."""

    query: str = Field("", description="before what is searched with, where texts are searched")
    text: str = Field("", description="before the texts of a corpus")
    pooled: bool = Field(True, description="whether the prompt's own tokens are pooled with the text's")


class TwoTowerConfig(Config):
    """An image tower, a text tower with its tokenizer, and the space they share."""

    dim: int = Field(128, gt=0, description="dimension D of the shared space")
    image: AnyImageTower | None = Field(
        default_factory=ConvNetConfig, description="null: texts alone, one tower for queries and documents"
    )
    text: AnyTextTower = Field(default_factory=TextTransformerConfig)
    tokenizer: AnyTokenizer = Field(default_factory=TokenizerConfig)
    prompts: PromptsConfig = Field(default_factory=PromptsConfig)
    projection: Literal["linear", "none"] = Field(
        "linear", description="from a tower's features to the space; none: they are the space, and as wide as `dim`"
    )

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_tower(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("text"), dict):
            return data
        tokenizer = data.get("tokenizer", {})
        if data["text"].get("name") == "transformers" and isinstance(tokenizer, dict) and "name" not in tokenizer:
            return {**data, "tokenizer": {"name": "pretrained", **tokenizer}}
        return data

    @model_validator(mode="after")
    def _agree(self) -> "TwoTowerConfig":
        if isinstance(self.tokenizer, PretrainedTokenizerConfig) and self.tokenizer_source is None:
            raise ValueError("tokenizer: name pretrained needs a source, or a text tower that has one")
        return self

    @property
    def tokenizer_source(self) -> str | None:
        """The directory of a pretrained tokenizer; None where it is learned."""
        if not isinstance(self.tokenizer, PretrainedTokenizerConfig):
            return None
        return self.tokenizer.source or getattr(self.text, "source", None)

    @property
    def image_size(self) -> int:
        """Side of the pictures that the image tower takes; 0 without one."""
        return self.image.image_size if self.image else 0

    def resolved(self) -> "TwoTowerConfig":
        """The same with all that a model directory must say of its towers. Raises ModelError if that cannot be read."""
        update: dict[str, Any] = {"image": self.image.resolved()} if self.image else {}
        if isinstance(self.text, PretrainedTextConfig) and self.text.architecture is None:
            update["text"] = self.text.model_copy(update={"architecture": self.text.network})
        return self.model_copy(update=update)


class TwoTower(nn.Module):
    """The dual encoder of CLIP (Radford et al., 2021): each tower's features, projected and normalised."""

    def __init__(self, config: TwoTowerConfig, vocab_size: int) -> None:
        """Raises ModelError if the parts do not fit together."""
        super().__init__()
        self.config = config
        self.image = config.image.build() if config.image else None
        self.text = config.text.build(vocab_size, config.tokenizer.max_length)
        try:
            self.text_pooling = config.text.pooling.build(self.text.features, self.text.layers, causal=self.text.causal)
        except ValueError as error:
            raise ModelError(str(error), where="model.text.pooling") from error
        self.image_projection = self._projection("image", self.image.features) if self.image else None
        self.text_projection = self._projection("text", self.text.features)

    def _projection(self, tower: str, features: int) -> nn.Module:
        if self.config.projection == "linear":
            return nn.Linear(features, self.config.dim, bias=False)
        if features != self.config.dim:
            raise ModelError(
                f"without a projection dim ({self.config.dim}) must be the {tower} tower's width ({features})",
                where="model.dim",
                fix=f"model.dim={features}, or model.projection=linear",
            )
        return nn.Identity()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit vectors `(B, D)` fp32 (fp64 weights: fp64) of pixels `(B, 3, S, S)` uint8.

        Raises ModelError without an image tower.
        """
        if self.image is None or self.image_projection is None:
            raise ModelError("the model has no image tower", fix="train one with model.image")
        return _unit(self.image_projection(self.image(pixels)))

    def encode_text(self, ids_BL: Tensor, skip_B: Tensor | None = None) -> Tensor:
        """Unit vectors `(B, D)` fp32 (fp64 weights: fp64) of token ids `(B, L)` int64, -1 = padding.

        `skip_B` int64: so many leading tokens of each text are read but not pooled: its instruction.
        """
        layers = self.text(ids_BL, every_layer=self.text_pooling.every_layer)
        pooled = self.text_pooling(layers, pooled_tokens(ids_BL, skip_B))
        return _unit(self.text_projection(pooled))

    def encode_text_exits(self, ids_BL: Tensor, skip_B: Tensor | None, layers: Sequence[int]) -> list[Tensor]:
        """Unit vectors `(B, D)` after the first so many layers of the text tower each, in one pass; see `encode_text`.

        Raises ModelError for a pooling of all layers: it is of one depth alone.
        """
        if self.text_pooling.every_layer:
            raise ModelError(
                f"{type(self.text_pooling).__name__} looks at all layers and cannot be had of fewer",
                where="model.text.pooling",
                fix="use a pooling of the last layer",
            )
        mask = pooled_tokens(ids_BL, skip_B)
        states = self.text.exits(ids_BL, layers)
        return [_unit(self.text_projection(self.text_pooling([state], mask))) for state in states]

    def encode_tokens(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors `(B, L, D)` of the tokens themselves, unpooled, and which of them there are, `(B, L)` bool."""
        states = self.text(ids_BL)[-1]
        return _unit(self.text_projection(states)), ids_BL != PADDING

    def forward(self, pixels: Tensor, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Both towers at once: `(B, D)` images and `(B, D)` texts."""
        return self.encode_image(pixels), self.encode_text(ids_BL)


def pooled_tokens(ids_BL: Tensor, skip_B: Tensor | None) -> Tensor:
    """The tokens `(B, L)` bool that count: neither padding nor among the first `skip_B` of their text."""
    real = ids_BL != PADDING
    if skip_B is None:
        return real
    return real & (torch.arange(ids_BL.shape[1], device=ids_BL.device) >= skip_B[:, None])


def _unit(x: Tensor) -> Tensor:
    # Normalised in fp32 whatever the compute dtype: bf16 norms are off by up to 1 %.
    return F.normalize(x if x.element_size() == 8 else x.float(), dim=-1)
