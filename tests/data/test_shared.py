"""Decoded rows that trainings share: the same arrays, decoded once, and never a stale or a broken one."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayemb.data.augment import AugmentConfig
from rayemb.data.decode import BadRow, Decoder, DecodeSettings, Member, Piece
from rayemb.data.mix import CorpusEntry, MixConfig
from rayemb.data.shared import Shared, SharedPieces, forget, shared_folder
from rayemb.data.stream import LoaderConfig, StreamSettings, _shared
from rayemb.models import TextTokenizer, TokenizerConfig
from tests.data.corpora import write_corpus

TOKENIZER = TextTokenizer.train(["text texte текст 0 1 2 3 4 5 6 7 8 9"], TokenizerConfig(vocab_size=600))
PIECE = Piece(3, ((0, np.arange(5, 25)),))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()


class Counting:
    """A decoder that counts what it is asked."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.asked = decoder, 0

    def __call__(self, piece: Piece) -> Any:
        self.asked += 1
        return self.decoder(piece)


def pieces(decoder: Any, key: str = "key", limit: int = 1 << 20) -> SharedPieces:
    return SharedPieces(decoder, Shared("sweep", key, limit))


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name]) for name in first
    )


def test_what_one_decoded_another_finds_the_same(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "images", {"train": [37, 23]})
    member = Member(CorpusEntry(), corpus.kind, corpus.row_groups("train"), corpus.image_limits)
    decoder = Decoder([member], DecodeSettings(TOKENIZER, 8, 3, AugmentConfig()))
    alone, bad = decoder(PIECE)
    assert bad == []
    first, second = Counting(decoder), Counting(decoder)
    assert equal(pieces(first)(PIECE)[0], alone)
    shutil.rmtree(tmp_path / "images")  # the second one needs it no more
    it = pieces(second)
    assert equal(it(PIECE)[0], alone)
    assert (first.asked, second.asked, it.hits) == (1, 0, 1)


def test_another_step_other_rows_or_another_key_are_another_piece() -> None:
    def decoder(piece: Piece) -> Any:
        return {"row": piece.parts[0][1] * 2}, [BadRow("there", "id-1", "corrupt_image", "bad")]

    counting = Counting(decoder)
    it = pieces(counting)
    for piece in (PIECE, Piece(4, PIECE.parts), Piece(3, ((1, np.arange(5, 25)),)), Piece(3, ((0, np.arange(6, 25)),))):
        for _ in range(2):
            arrays, bad = it(piece)
            assert arrays["row"].tolist() == (piece.parts[0][1] * 2).tolist()
            assert bad == [BadRow("there", "id-1", "corrupt_image", "bad")]
    assert counting.asked == 4
    pieces(counting, key="other")(PIECE)
    assert counting.asked == 5


def test_a_broken_file_is_decoded_anew_and_the_limit_is_kept() -> None:
    counting = Counting(lambda piece: ({"row": np.zeros(1000, np.int64)}, []))
    it = pieces(counting, limit=20_000)
    for step in range(5):
        it(Piece(step, PIECE.parts))
    files = sorted(shared_folder("sweep").rglob("*.npz"))
    assert len(files) == 2
    assert not list(shared_folder("sweep").rglob("*.tmp"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert it(Piece(0, PIECE.parts))[0]["row"].shape == (1000,)
    assert counting.asked == 6
    assert shared_folder("sweep").parent.stat().st_mode & 0o077 == 0
    forget("sweep")
    assert not shared_folder("sweep").exists()


def test_the_key_is_of_all_that_decides_what_a_row_becomes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "one", {"train": [8]})
    other = write_corpus(tmp_path / "two", {"train": [9]})

    def key(size: int = 8, seed: int = 3, augment: AugmentConfig | None = None, **entry: Any) -> str:
        entries = {"main": CorpusEntry(**{"uri": corpus.uri, **entry})}
        settings = StreamSettings(entries, MixConfig(), 4, seed)
        found = _shared(
            settings, DecodeSettings(TOKENIZER, size, seed, augment or AugmentConfig()), LoaderConfig(shared="s")
        )
        assert found is not None
        return found.key

    assert key() == key(fraction=0.5) == key(weight=2.0)
    changed = [key(size=9), key(seed=4), key(uri=other.uri), key(text_prefix="a "), key(main_caption=1.0)]
    assert len({key(), *changed}) == 6
    assert (
        _shared(StreamSettings({}, MixConfig(), 4, 0), DecodeSettings(TOKENIZER, 8, 3, AugmentConfig()), LoaderConfig())
        is None
    )
