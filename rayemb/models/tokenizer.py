"""Texts to token ids, through the `tokenizers` library; a tokenizer is one `tokenizer.json` anyone can open."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rayemb.config import Config

PAD, CLS, UNK = "[PAD]", "[CLS]", "[UNK]"


class TokenizerConfig(Config):
    """A byte-level BPE learned from the training captions: every language, no unknown token."""

    name: Literal["bpe"] = "bpe"
    vocab_size: int = Field(8192, ge=512, description="tokens, the 256 bytes included")
    max_length: int = Field(24, ge=2, description="tokens per text, [CLS] included; longer texts are cut")


class TextTokenizer:
    """Texts to padded ids `(B, L)`; `L` is the longest text of the batch, at most `max_length`."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        tokenizer.enable_truncation(max_length)
        tokenizer.no_padding()
        # A text that says "[PAD]" is text: else any caption or query could write control tokens.
        tokenizer.encode_special_tokens = True

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> "TextTokenizer":
        """A BPE learned from `texts`; the same texts in the same order give the same tokenizer."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[PAD, CLS, UNK],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A", special_tokens=[(CLS, tokenizer.token_to_id(CLS))]
        )
        return cls(tokenizer, config.max_length)

    @classmethod
    def from_json(cls, text: str, max_length: int) -> "TextTokenizer":
        """The tokenizer of a `tokenizer.json`."""
        return cls(Tokenizer.from_str(text), max_length)

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return str(self.tokenizer.to_str())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones included."""
        return int(self.tokenizer.get_vocab_size())

    def __call__(self, texts: Sequence[str], *, pad_to: int | None = None) -> NDArray[np.int64]:
        """Token ids `(B, L)` int64, padded with 0 (`[PAD]`) to the longest text, or to `pad_to`."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        width = pad_to or max((len(row) for row in rows), default=1)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        return ids

    def __reduce__(self) -> tuple[object, ...]:
        return TextTokenizer.from_json, (self.to_json(), self.max_length)
