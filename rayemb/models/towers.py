"""What every tower offers: features of its inputs, whatever is inside."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from rayemb.config import Config
from rayemb.models.context import ContextConfig
from rayemb.models.pooling import AnyPooling, MeanPoolingConfig


class TextTower(nn.Module, ABC):
    """Token ids to the states of its layers.

    features: width E of the states. layers: how many it has. causal: whether a token sees only those before it.
    longest: how many positions it was made for; None if nothing says. packs: whether texts of one length or another
    cost what their tokens cost, in one call, rather than what the longest does.
    """

    features: int
    layers: int
    causal: bool
    longest: int | None
    packs: bool = False

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The vectors of its tokens."""

    @abstractmethod
    def forward(self, ids_BL: Tensor, *, every_layer: bool = False) -> list[Tensor]:
        """States `(B, L, E)` of the last layer, or of every layer in order, for ids `(B, L)` int64, -1 = padding."""

    def finished(self, state_BLE: Tensor) -> Tensor:
        """The states `(B, L, E)` of a layer as those of the last one leave the tower: behind its last norm, if any."""
        return state_BLE

    def exits(self, ids_BL: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """States `(B, L, E)` as towers with only the first so many layers would give them, in one pass."""
        states = self(ids_BL, every_layer=True)
        return [states[n - 1] if n == self.layers else self.finished(states[n - 1]) for n in layers]


class ImageTower(nn.Module, ABC):
    """Pixels to features. features: their width E. image_size: side S of the pictures it takes."""

    features: int
    image_size: int

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """Features `(B, E)` of pixels `(B, 3, S, S)` uint8."""


class TextTowerConfig(Config, ABC):
    """Config of a text tower, and of what makes one vector of its states."""

    pooling: AnyPooling = Field(default_factory=MeanPoolingConfig, description="from states of tokens to one vector")
    attention_temperature: float = Field(
        1.0,
        gt=0,
        le=1,
        description="divides the logits of every attention; below 1 keeps long texts apart (TempScale, Zhou et al., "
        "2024). Part of the model: another value makes other vectors",
    )

    context: ContextConfig | None = Field(
        None, description="how texts longer than it was trained for are read (model.tokenizer.max_length); null: not"
    )

    def load_weights(self, tower: TextTower) -> None:
        """Puts weights into a tower that was just built, if the config names any."""

    @abstractmethod
    def cut(self, layers: int) -> "TextTowerConfig":
        """The same with its first so many layers alone."""

    @abstractmethod
    def build(self, vocab_size: int, max_length: int) -> TextTower:
        """The tower, with random weights. Raises ValueError if it cannot take such a vocabulary or length."""


class ImageTowerConfig(Config, ABC):
    """Config of an image tower."""

    image_size: int

    def resolved(self) -> "ImageTowerConfig":
        """The same with all that a model directory must say of it. Raises ModelError if that cannot be read."""
        return self

    def load_weights(self, tower: ImageTower) -> None:
        """Puts weights into a tower that was just built, if the config names any."""

    @abstractmethod
    def build(self) -> ImageTower:
        """The tower, with random weights."""
