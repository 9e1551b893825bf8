import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayemb.index import merge

# Few distinct scores, so that ties are the rule.
_scores = st.sampled_from([-np.inf, -1.0, -0.25, 0.0, 0.5, 1.0])


@st.composite
def _answers(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    queries, k = draw(st.integers(0, 4)), draw(st.integers(1, 12))
    widths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    scores, keys = [], []
    for width in widths:
        flat = draw(st.lists(_scores, min_size=queries * width, max_size=queries * width))
        scores.append(np.array(flat, np.float32).reshape(queries, width))
        named = draw(st.lists(st.integers(-1, 2**62), min_size=queries * width, max_size=queries * width))
        keys.append(np.array(named, np.int64).reshape(queries, width))
    return scores, keys, k


@given(_answers())
def test_merge_is_a_sort_by_score_and_key(answers: tuple[list[np.ndarray], list[np.ndarray], int]) -> None:
    scores, keys, k = answers
    found_scores, found_keys = merge(scores, keys, k)
    assert found_scores.shape == found_keys.shape == (len(scores[0]), k)
    assert (found_scores.dtype, found_keys.dtype) == (np.float32, np.int64)
    for row in range(len(scores[0])):
        pairs = [
            (-float(score), int(key))
            for part, names in zip(scores, keys, strict=True)
            for score, key in zip(part[row], names[row], strict=True)
            if key >= 0
        ]
        best = sorted(pairs)[:k]
        missing = k - len(best)
        assert found_keys[row].tolist() == [key for _, key in best] + [-1] * missing
        assert found_scores[row].tolist() == [-score for score, _ in best] + [-np.inf] * missing


def test_empty_places_keep_no_score_of_their_own() -> None:
    # FAISS pads with -3.4e38, contrib code with 0 or +inf.
    scores, keys = merge([np.array([[np.inf, 0.5]], np.float32)], [np.array([[-1, 7]])], 2)
    assert keys.tolist() == [[7, -1]]
    assert scores.tolist() == [[0.5, -np.inf]]
