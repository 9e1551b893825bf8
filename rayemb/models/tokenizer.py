"""Texts to token ids, through the `tokenizers` library; a tokenizer is one `tokenizer.json` anyone can open."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rayemb import storage
from rayemb.config import Config
from rayemb.models.errors import ModelError

PAD, CLS, UNK = "[PAD]", "[CLS]", "[UNK]"
# What stands for something hidden. A tokenizer of ours has no token for it, and one that no text ever has: [UNK].
MASKS = ("[MASK]", "<mask>", UNK, "<unk>")
Span = tuple[int, int]  # from the first character to the one after the last
# Where a text has no token. No id of any vocabulary: a pretrained one has its own idea of padding, or none.
PADDING = -1


class TokenizerConfig(Config):
    """A byte-level BPE learned from the training captions: every language, no unknown token."""

    name: Literal["bpe"] = "bpe"
    vocab_size: int = Field(8192, ge=512, description="tokens, the 256 bytes included")
    max_length: int = Field(24, ge=2, description="tokens per text, [CLS] included; longer texts are cut")


class PretrainedTokenizerConfig(Config):
    """The tokenizer that a pretrained text tower was trained with."""

    name: Literal["pretrained"] = "pretrained"
    source: str | None = Field(
        None, description="directory with a tokenizer.json, path or URI; null: the source of the text tower"
    )
    max_length: int = Field(128, ge=2, description="tokens per text, special ones included; longer texts are cut")


def _named(value: Any) -> Any:
    return {"name": "bpe", **value} if isinstance(value, dict) else value


AnyTokenizer = Annotated[
    TokenizerConfig | PretrainedTokenizerConfig, Field(discriminator="name"), BeforeValidator(_named)
]


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

    @classmethod
    def from_source(cls, source: str, max_length: int) -> "TextTokenizer":
        """The tokenizer of a directory, path or URI. Raises ModelError if it has no tokenizer.json."""
        try:
            return cls.from_json(storage.read_bytes(storage.join(source, "tokenizer.json")).decode(), max_length)
        except storage.StorageError as error:
            raise ModelError(
                f"tokenizer.json: {error.what}", where=source, fix="save it with a fast tokenizer of transformers"
            ) from error
        except Exception as error:  # the library raises plain Exception for what it cannot read
            raise ModelError(f"tokenizer.json cannot be read ({error})", where=source) from error

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return str(self.tokenizer.to_str())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones included."""
        return int(self.tokenizer.get_vocab_size())

    @property
    def mask(self) -> tuple[str, int]:
        """The token that stands for something hidden, and its id. Raises ModelError if there is none."""
        for token in MASKS:
            if (number := self.tokenizer.token_to_id(token)) is not None:
                return token, int(number)
        raise ModelError(f"the tokenizer has no mask (none of {', '.join(MASKS)})", where="model.tokenizer")

    def with_prompt(
        self, texts: Sequence[str], prompt: str, spans: Sequence[Span | None] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids `(B, L)` of the texts behind a prompt, and how many of each row's are the prompt's, `(B,)` int64.

        The prompt's are those that end within it, and whatever special tokens stand before them; 0 without a prompt.
        One is always left, if only of an empty text. `spans`: the characters of each text that one mask token stands
        for. Raises ModelError for spans if there is no mask token.
        """
        rows = self.tokenizer.encode_batch([prompt + text for text in texts])
        for number, span in enumerate(spans or ()):
            if span is not None:
                rows[number] = self._masked(prompt + texts[number], len(prompt) + span[0], len(prompt) + span[1])
        skips = np.zeros(len(rows), dtype=np.int64)
        if prompt:
            for number, row in enumerate(rows):
                # A special token has an empty span.
                within = [index for index, (start, end) in enumerate(row.offsets) if start < end <= len(prompt)]
                skips[number] = min(max(within, default=-1) + 1, len(row.ids) - 1)
        return _padded([row.ids for row in rows]), skips

    def __call__(self, texts: Sequence[str], *, pad_to: int | None = None) -> NDArray[np.int64]:
        """Token ids `(B, L)` int64, padded with -1 to the longest text, or to `pad_to`."""
        return _padded([encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))], pad_to)

    def _masked(self, text: str, start: int, stop: int) -> Encoding:
        """The tokens of what is left and right of a span, each by itself, and a mask between them."""
        inner = self.tokenizer
        left, right = inner.encode_batch([text[:start], text[stop:]], add_special_tokens=False)
        inner.encode_special_tokens = False
        try:
            mask = inner.encode(self.mask[0], add_special_tokens=False)
        finally:
            inner.encode_special_tokens = True
        return inner.post_process(Encoding.merge([left, mask, right], growing_offsets=True))

    def __reduce__(self) -> tuple[object, ...]:
        return TextTokenizer.from_json, (self.to_json(), self.max_length)


def _padded(rows: Sequence[Sequence[int]], width: int | None = None) -> NDArray[np.int64]:
    ids = np.full((len(rows), width or max((len(row) for row in rows), default=1)), PADDING, dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids
