"""What is hidden of texts in pre-training: whole words, drawn for each row and step, on any number of workers."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.data.augment import draws
from rayemb.models import PADDING, TextTokenizer

# Distinct sets of words that the decoder sees, of each text: reused over its positions. The released code has 256; at
# 512 tokens that many draws cost more than the step.
PATTERNS = 64
SALT = 0x5245_5452_4F  # other draws than those that decode the row


class Vocabulary(NamedTuple):
    """What masking must know of a tokenizer: `(V,)` bool, whether a token goes on with a word, or is no word at all."""

    continues: NDArray[np.bool_]
    special: NDArray[np.bool_]
    mask: int

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "Vocabulary":
        """That of a tokenizer. Raises ModelError if it has no mask token."""
        inner, size = tokenizer.tokenizer, tokenizer.vocab_size
        tokens = [inner.id_to_token(number) or "" for number in range(size)]
        special = np.zeros(size, dtype=bool)
        special[[number for number, token in inner.get_added_tokens_decoder().items() if token.special]] = True
        # WordPiece marks what goes on; byte-level BPE and SentencePiece mark what begins.
        if any(token.startswith("##") for token in tokens):
            goes_on = [token.startswith("##") for token in tokens]
        elif any(token.startswith(("Ġ", "▁")) for token in tokens):
            goes_on = [not token.startswith(("Ġ", "▁")) for token in tokens]
        else:
            goes_on = [False] * size
        return cls(np.array(goes_on) & ~special, special, tokenizer.mask[1])


class Hidden(NamedTuple):
    """What is hidden of texts; see `rayemb.models.reconstruction.Masked`."""

    masked: NDArray[np.int64]
    hidden: NDArray[np.bool_]
    ordinary: NDArray[np.bool_]
    visible: NDArray[np.bool_]


def hide(
    ids: NDArray[np.int64],
    rows: NDArray[np.int64],
    seeds: tuple[int, int],
    words: Vocabulary,
    *,
    encoder: float,
    decoder: float,
) -> Hidden:
    """What is hidden of texts `ids` (B, L) int64, -1 = padding; a function of each text, its row's number and `seeds`.

    `encoder` and `decoder`: the probability of a word to be hidden from each. Of the tokens that are hidden from the
    tower 80 % become the mask, 10 % any token, 10 % stay (BERT); at least one word of a text is among them.
    """
    L = ids.shape[1]
    patterns = min(L, PATTERNS)
    u = _per_token(seeds, rows, L, 2 + patterns)
    ordinary = (ids != PADDING) & ~words.special[ids]
    starts = _starts(ids, ordinary, words)
    by_word = np.take_along_axis(u, np.broadcast_to(starts[:, None], u.shape), axis=2)
    hidden = ordinary & (by_word[:, 0] < encoder)
    lowest = np.where(ordinary, by_word[:, 0], 2.0).min(1, initial=2.0)
    hidden |= ordinary & ~hidden.any(1, keepdims=True) & (by_word[:, 0] == lowest[:, None])
    kind = u[:, 1]
    masked = np.where(hidden & (kind < 0.8), words.mask, ids)
    other = np.minimum((kind - 0.8) * 10 * len(words.special), len(words.special) - 1).astype(np.int64)
    masked = np.where(hidden & (kind >= 0.8) & (kind < 0.9), other, masked)
    shown = by_word[:, 2:] >= decoder
    real = ids != PADDING
    visible = np.where(ordinary[:, None], shown[:, np.arange(L) % patterns], real[:, None])
    visible &= ~np.eye(L, dtype=bool)
    visible[:, :, 0] = True
    return Hidden(masked, hidden, ordinary, visible)


def _per_token(seeds: tuple[int, int], rows: NDArray[np.int64], length: int, number: int) -> NDArray[np.float64]:
    """Uniform numbers `(B, number, L)`: of each row and place its own, whatever the length of the batch."""
    places = rows[:, None] * np.int64(1 << 16) + np.arange(length)
    u = draws([*seeds, SALT], places.reshape(-1), number)
    return u.reshape(len(rows), length, number).transpose(0, 2, 1)


def _starts(ids: NDArray[np.int64], ordinary: NDArray[np.bool_], words: Vocabulary) -> NDArray[np.int64]:
    """Where each token's word begins, `(B, L)`; a token that is no word begins its own."""
    after_word = np.zeros_like(ordinary)
    after_word[:, 1:] = ordinary[:, :-1]
    begins = ~(ordinary & after_word & words.continues[ids])
    return np.maximum.accumulate(np.where(begins, np.arange(ids.shape[1]), 0), axis=1)
