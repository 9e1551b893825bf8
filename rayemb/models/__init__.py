"""Encoders and everything that turns one image or one text into a vector. Plain torch; knows no Ray."""

from rayemb.models.bundle import Model, model_digest
from rayemb.models.convnet import ConvNet, ConvNetConfig
from rayemb.models.errors import ModelError
from rayemb.models.images import ImageError, ImageLimits, decode_image, describe_image, image_tensor
from rayemb.models.pretrained import PretrainedTextConfig
from rayemb.models.text import TextTransformer, TextTransformerConfig
from rayemb.models.tokenizer import PADDING, PretrainedTokenizerConfig, TextTokenizer, TokenizerConfig
from rayemb.models.two_tower import PromptsConfig, TwoTower, TwoTowerConfig
from rayemb.models.vit import ViT, ViTConfig

__all__ = [
    "PADDING",
    "ConvNet",
    "ConvNetConfig",
    "ImageError",
    "ImageLimits",
    "Model",
    "ModelError",
    "PretrainedTextConfig",
    "PretrainedTokenizerConfig",
    "PromptsConfig",
    "TextTokenizer",
    "TextTransformer",
    "TextTransformerConfig",
    "TokenizerConfig",
    "TwoTower",
    "TwoTowerConfig",
    "ViT",
    "ViTConfig",
    "decode_image",
    "describe_image",
    "image_tensor",
    "model_digest",
]
