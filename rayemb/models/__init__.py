"""Encoders and everything that turns one image or one text into a vector. Plain torch; knows no Ray."""

from rayemb.models.bundle import Model, ModelError, model_digest
from rayemb.models.convnet import ConvNet, ConvNetConfig
from rayemb.models.images import ImageError, ImageLimits, decode_image, describe_image, image_tensor
from rayemb.models.text import TextTransformer, TextTransformerConfig
from rayemb.models.tokenizer import TextTokenizer, TokenizerConfig
from rayemb.models.two_tower import TwoTower, TwoTowerConfig

__all__ = [
    "ConvNet",
    "ConvNetConfig",
    "ImageError",
    "ImageLimits",
    "Model",
    "ModelError",
    "TextTokenizer",
    "TextTransformer",
    "TextTransformerConfig",
    "TokenizerConfig",
    "TwoTower",
    "TwoTowerConfig",
    "decode_image",
    "describe_image",
    "image_tensor",
    "model_digest",
]
