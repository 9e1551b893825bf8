"""Learned quality: the preference loss, the length control, and a scorer that ranks what it has not seen."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rayemb.curate import LearnedQuality, Rows
from rayemb.curate.learned_quality import _others
from rayemb.curate.preference import Judge, fit_judge, preference_loss, ranked_right, weak_captions
from tests.curate.digits import caption, corpus_of, digit_rows, judged, labels_of, own_vectors, trained_model

ROWS = 400


def test_the_loss_is_ln_2_for_equals_and_pushes_the_two_apart() -> None:
    better, worse = (torch.tensor([0.7], requires_grad=True) for _ in range(2))
    loss = preference_loss(better, worse)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    loss.sum().backward()
    assert float(better.grad) == pytest.approx(-0.5)  # type: ignore[arg-type]
    assert float(worse.grad) == pytest.approx(0.5)  # type: ignore[arg-type]
    shifted = preference_loss(torch.tensor([3.0]) + 100, torch.tensor([1.0]) + 100)
    assert float(shifted) == pytest.approx(-math.log(1 / (1 + math.exp(-2))), rel=1e-5)


def test_weak_captions_go_from_good_to_bad() -> None:
    rng = np.random.default_rng(0)
    own, shuffled, dropped, other = weak_captions("a black cat on a mat", "two dogs", rng)
    assert (own, other) == ("a black cat on a mat", "two dogs")
    assert shuffled is not None
    assert sorted(shuffled.split()) == sorted(["a", "black", "cat", "on", "a", "mat"])
    assert shuffled != own
    assert dropped is not None
    words = iter(["a", "black", "cat", "on", "a", "mat"])
    assert all(word in words for word in dropped.split())  # in the old order
    assert len(dropped.split()) == 3
    assert weak_captions("heart", "star", rng) == ["heart", None, None, "star"]
    assert weak_captions("heart", "heart", rng) == ["heart", None, None, None]


def test_another_item_s_caption_is_of_a_similar_length() -> None:
    texts = [" ".join(["word"] * n) + f" {n}" for n in range(1, 40)]
    others = _others(texts, np.random.default_rng(0))
    assert all(a != b for a, b in zip(texts, others, strict=True))
    gaps = [abs(len(a.split()) - len(b.split())) for a, b in zip(texts, others, strict=True)]
    assert sorted(gaps)[-2] == 1  # the longest has to take the shortest


def random_items(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Items whose captions are ever further from them, and the shorter the further."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 8)).astype(np.float32)
    captions = np.stack([x + level * rng.normal(size=x.shape) * 0.8 for level in range(4)], 1).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    captions /= np.linalg.norm(captions, axis=2, keepdims=True)
    words = np.maximum(1, rng.integers(4, 20, (count, 1)) - np.arange(4) * 2)
    return x, captions, np.ones((count, 4), bool), words


def test_a_judge_ranks_unseen_items_and_owes_nothing_to_length() -> None:
    settings = {"hidden": 32, "epochs": 15, "batch": 64, "rate": 3e-3, "seed": 1}
    train, test = random_items(500, 0), random_items(200, 1)
    judge = fit_judge(*train, length_control=False, **settings)  # type: ignore[arg-type]
    right = ranked_right(judge, *test)
    assert right["all"] > 0.75
    x, captions, _, words = test
    scores = [judge.scores(x, captions[:, k], words[:, k]) for k in range(4)]
    pairs = [(scores[a] > scores[b]).mean() for a in range(4) for b in range(a + 1, 4)]
    assert right["all"] == pytest.approx(np.mean(pairs), abs=1e-9)
    assert right["own over other"] == pytest.approx((scores[0] > scores[3]).mean(), abs=1e-9)

    again = fit_judge(*train, length_control=True, **settings)  # type: ignore[arg-type]
    own = again.scores(train[0], train[1][:, 0], train[3][:, 0])
    assert abs(np.corrcoef(own, np.log1p(train[3][:, 0]))[0, 1]) < 1e-4
    plain = judge.scores(train[0], train[1][:, 0], train[3][:, 0])
    expected = plain - again.slope * (np.log1p(train[3][:, 0]) - again.centre)
    np.testing.assert_allclose(own, expected, atol=1e-5)  # the same seed gave the same scorer


def test_a_judge_survives_its_file(tmp_path: Path) -> None:
    x, captions, valid, words = random_items(80, 0)
    judge = fit_judge(x, captions, valid, words, hidden=8, epochs=1, batch=32, rate=1e-3, seed=0, length_control=True)
    (tmp_path / "scorer.safetensors").write_bytes(judge.to_bytes(model="m"))
    loaded = Judge.from_file(str(tmp_path / "scorer.safetensors"))
    assert np.array_equal(loaded.scores(x, captions[:, 0], words[:, 0]), judge.scores(x, captions[:, 0], words[:, 0]))


@pytest.mark.usefixtures("ray_cluster")
def test_the_best_share_of_digits_with_wrong_texts(tmp_path: Path) -> None:
    """30 % of the texts name another digit, or are garbled; the scorer has to be trained on just these."""
    rng, labels = np.random.default_rng(0), labels_of(ROWS)
    bad = rng.random(ROWS) < 0.3
    texts = []
    for n, label in enumerate(labels):
        right = caption(int(label), n)
        if not bad[n]:
            texts.append(right)
        elif n % 2:
            texts.append(caption(int((label + 1 + n % 9) % 10), n))
        else:
            texts.append(" ".join(rng.permutation(right.split())[:3]))
    corpus = corpus_of(tmp_path / "corpus", digit_rows(ROWS, text=texts))
    trained_model().save(str(tmp_path / "model"))
    step = LearnedQuality(model=str(tmp_path / "model"), workers=1, keep_fraction=0.6, epochs=25)
    rows = Rows.of(corpus, folder=str(tmp_path / "work"), seed=1)
    found = judged(step, rows)
    kept = [n for n in range(ROWS) if not found[n]["drop"]]
    assert len(kept) == 240
    assert rows.facts["ranked_right"]["all"] > 0.7
    assert bad[kept].mean() < 0.5 * bad.mean()
    judge = Judge.from_file(str(tmp_path / "work" / "scorer.safetensors"))
    query, text = own_vectors(ROWS, texts)
    words = np.array([len(t.split()) for t in texts])
    np.testing.assert_allclose([found[n]["score"] for n in range(ROWS)], judge.scores(query, text, words), atol=1e-4)
