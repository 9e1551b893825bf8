"""Two towers, one space: images and texts as unit vectors that can be compared."""

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.config import Config
from rayemb.models.convnet import ConvNet, ConvNetConfig
from rayemb.models.text import TextTransformer, TextTransformerConfig
from rayemb.models.tokenizer import TokenizerConfig


class TwoTowerConfig(Config):
    """An image tower, a text tower with its tokenizer, and the space they share."""

    dim: int = Field(128, gt=0, description="dimension D of the shared space")
    image: ConvNetConfig = ConvNetConfig()
    text: TextTransformerConfig = TextTransformerConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()


class TwoTower(nn.Module):
    """The dual encoder of CLIP (Radford et al., 2021): each tower's features, projected and normalised."""

    def __init__(self, config: TwoTowerConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.image = ConvNet(config.image)
        self.text = TextTransformer(config.text, vocab_size, config.tokenizer.max_length)
        self.image_projection = nn.Linear(self.image.features, config.dim, bias=False)
        self.text_projection = nn.Linear(self.text.features, config.dim, bias=False)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit vectors `(B, D)` fp32 (fp64 weights: fp64) of pixels `(B, 3, S, S)` uint8."""
        return _unit(self.image_projection(self.image(pixels)))

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Unit vectors `(B, D)` fp32 (fp64 weights: fp64) of token ids `(B, L)` int64, 0 = padding."""
        return _unit(self.text_projection(self.text(ids_BL)))

    def forward(self, pixels: Tensor, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Both towers at once: `(B, D)` images and `(B, D)` texts."""
        return self.encode_image(pixels), self.encode_text(ids_BL)


def _unit(x_BD: Tensor) -> Tensor:
    # Normalised in fp32 whatever the compute dtype: bf16 norms are off by up to 1 %.
    return F.normalize(x_BD if x_BD.element_size() == 8 else x_BD.float(), dim=-1)
