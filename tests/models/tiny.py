"""The smallest real model."""

from rayemb.models import ConvNetConfig, Model, TextTokenizer, TextTransformerConfig, TokenizerConfig, TwoTowerConfig

CONFIG = TwoTowerConfig(
    dim=8,
    image=ConvNetConfig(image_size=16, patch=4, widths=(8, 12), depths=(1, 1)),
    text=TextTransformerConfig(width=16, depth=1, heads=2),
    tokenizer=TokenizerConfig(vocab_size=512, max_length=10),
)


def tiny_model(seed: int = 0) -> Model:
    tokenizer = TextTokenizer.train(["a red heart", "blue star", "green circle"] * 3, CONFIG.tokenizer)
    return Model.create(CONFIG, tokenizer, seed)
