"""What there is to look at of a task: faithful, bounded, said in words, and of no script."""

import math
import re
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rayemb.config import ConfigError, from_mapping
from rayemb.evaluate.plots.confusion import MOST, confusion_table
from rayemb.evaluate.plots.similarities import overlap, similarity_plot
from rayemb.evaluate.plots.space import LOOKS, Budget, space_view
from rayemb.evaluate.report import Confusion, Report, Similarities, Space, render
from rayemb.models.images import ImageError
from tests.evaluate.test_report import EVIL, Page, picture, poisoned, put, sample

N = 30


def space(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "method": "umap",
        "rows": 12_345,
        "x": rng.random(N).tolist(),
        "y": rng.random(N).tolist(),
        "labels": [("cat", "dog", "owl")[i % 3] for i in range(N)],
        "texts": [f"text of {i}" for i in range(N)],
        "images": [picture("red") if i % 2 else None for i in range(N)],
        "neighbours_kept": 0.4321,
    } | changes


def shown() -> dict[str, Any]:
    """A report whose first split has everything that can be shown."""
    data = sample()
    data["results"][0] |= {
        "space": space(),
        "similarities": {"edges": [-1, 0, 0.5, 1], "positives": [0, 10, 30], "negatives": [60, 30, 10]},
        "curves": [
            {"metric": "recall", "ks": [1, 10, 100], "systems": {"trained": [0.1, 0.5, 0.9], "bm25": [0.2, 0.3, 0.4]}},
            {"metric": "ndcg", "ks": [5], "systems": {"untrained": [0.0625]}},
        ],
        "confusion": {
            "labels": ["cat", "dog", "owl"],
            "shares": [[0.7, 0.3, 0.0], [0.256, 0.741, 0.003], [0.0, 0.0, 1.0]],
            "note": "All classes.",
        },
        "diagnostics": {"trained": {"rankme": 87.654, "hubness": 2.5}, "untrained": {"rankme": 3.21}},
    }
    data["examples"].append(
        {
            "split": "zero_shot",
            "direction": "query→document",
            "text": "long " * 100,
            "rank": 57,
            "hits": [{"caption": "far off", "score": 0.5, "relevant": False}],
            "wanted": {"caption": "the right one", "score": 0.25, "relevant": True},
        }
    )
    lost = {"split": "zero_shot", "direction": "query→document", "text": "nowhere to be found", "worst": True}
    data["examples"].append({**lost, "hits": [{"caption": "of no use", "score": 0.125, "relevant": False}]})
    return data


@pytest.fixture(scope="module")
def page() -> tuple[Page, str]:
    html = render(from_mapping(Report, shown()))
    return Page(html), html


def test_each_picture_says_its_figures_in_words(page: tuple[Page, str]) -> None:
    found, _ = page
    said = [attributes["aria-label"] for _, attributes in found.elements if attributes.get("role") == "img"]
    assert len(said) == 2 + 1 + 1 + 2 + 1  # bars, map, histograms, curves, training
    everything = " ".join(said)
    for words in (
        "30 of 12,345 vectors by UMAP",
        "43% are nearest by vector too",
        "Labels: cat 10, dog 10, owl 10.",
        "40 positive pairs, median 0.667; 100 negative pairs, median -0.167. They overlap in part (35%)",
        "trained 0.100 at 1, 0.500 at 10, 0.900 at 100; bm25 0.200 at 1, 0.300 at 10, 0.400 at 100",
        "Line chart of ndcg over k: untrained 0.062 at 5",
    ):
        assert words in everything, words
    assert "Most often taken for another: cat → dog (30%), dog → cat (26%), dog → owl (0%). All classes." in found.text
    assert "Own class: 81% on average, least for cat (70%)." in found.text


def test_every_point_is_where_it_belongs_and_says_what_it_is(page: tuple[Page, str]) -> None:
    _, html = page
    data = shown()["results"][0]["space"]
    dots = re.findall(r'<i class="k(\d+) (\w\w)( p)?" style="left:([\d.]+)%;top:([\d.]+)%">(.*?)</i>', html)
    assert len(dots) == N
    for i, (look, opens, with_picture, left, top, inside) in enumerate(dots):
        assert float(left) == pytest.approx(2 + 96 * data["x"][i], abs=0.01)
        assert float(top) == pytest.approx(98 - 96 * data["y"][i], abs=0.01)
        assert int(look) == ("cat", "dog", "owl").index(data["labels"][i])
        assert f"{data['labels'][i]} · text of {i}</b>" in inside
        assert bool(with_picture) == ("data:image/webp" in inside) == bool(i % 2)
        # What opens stays on the map: to the left in the right half, downwards in the upper half.
        assert opens == ("l" if data["x"][i] > 0.5 else "r") + ("d" if data["y"][i] > 0.5 else "u")


def test_the_table_of_classes_is_a_table_with_its_shares(page: tuple[Page, str]) -> None:
    _, html = page
    (table,) = re.findall(r'<table class="heat">.*?</table>', html, flags=re.S)
    cells = re.findall(r'<td style="--v:([\d.]+)">([^<]+)</td>', table)
    assert [float(value) for value, _ in cells] == [0.7, 0.3, 0, 0.256, 0.741, 0.003, 0, 0, 1]
    assert [text for _, text in cells] == ["70", "30", "0", "26", "74", "&lt;1", "0", "0", "100"]
    assert table.count('scope="row"') == table.count('scope="col"') == 3


def test_diagnostics_stand_under_their_systems_and_gaps_are_seen(page: tuple[Page, str]) -> None:
    found, _ = page
    assert "of the space trained untrained rankme 87.654 3.210 hubness 2.500 –" in found.text


def test_worst_queries_stand_apart_with_what_should_have_been_found(page: tuple[Page, str]) -> None:
    found, html = page
    worst, others = html.index('id="worst"'), html.index('id="examples"')
    assert worst < html.index("red heart") < others < html.index("a circle")
    assert worst < html.index("best relevant at rank 57") < html.index("the right one") < others
    assert worst < html.index("nowhere to be found") < others
    assert "rank 57 0.250 the right one ✓ relevant" in found.text
    assert "Drawn by seed." in found.text
    # A text of any length takes a bounded place.
    assert max(len(words) for words in found.words if "long long" in words) <= 300


def test_nothing_runs_and_nothing_is_loaded(page: tuple[Page, str]) -> None:
    found, html = page
    assert not found.all("script")
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert set(re.findall(r"var\((--[\w-]+)", html)) <= set(re.findall(r"(--[\w-]+):", html))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in found.all("a") if a["href"].startswith("#")} <= set(ids)


def test_text_of_tasks_is_never_markup() -> None:
    data = shown()
    data["results"][0] = poisoned(data["results"][0])
    data["results"][0]["space"]["method"] = "umap"
    data["results"][0]["diagnostics"] = {EVIL: {EVIL: 1.0}}
    data["results"][0]["curves"][0]["systems"] = {EVIL: [0.1, 0.5, 0.9]}
    html = render(from_mapping(Report, data))
    found = Page(html)
    assert not found.all("script")
    assert not [a for a in found.all("img") if "onerror" in a]
    assert "alert(1)</script>" not in html


def test_a_page_is_bounded_whatever_the_maps_are() -> None:
    big = from_mapping(
        Space,
        {
            "method": "pca",
            "rows": 50_000,
            "x": np.linspace(0, 1, 5000).tolist(),
            "y": [0.5] * 5000,
            "labels": [f"label {i % 100}" for i in range(5000)],
            "texts": ["word " * 500] * 5000,
            "images": [picture("red", (8, 8))] * 5000,
        },
    )
    budget = Budget()
    views = [space_view(big, budget) for _ in range(5)]
    assert [len(view.dots) for view in views] == [2000, 2000, 2000, 0, 0]
    assert sum(dot.picture is not None for view in views for dot in view.dots) == 400
    assert max(len(dot.text) for view in views for dot in view.dots) == 120
    # Spread over the sample, in its order.
    lefts = [float(dot.left) for dot in views[0].dots]
    assert 0 <= min(np.diff(lefts)) <= max(np.diff(lefts)) < 0.4
    legend = views[0].legend
    assert len(legend) == LOOKS + 1
    assert legend[-1] == (LOOKS, "84 more labels", 84 * 50)
    assert {dot.look for dot in views[0].dots} == set(range(LOOKS + 1))
    assert "2,000 of 50,000 vectors by principal components" in views[0].said


def test_the_nearest_point_on_the_map_is_counted() -> None:
    at = [0.0, 0.01, 0.5, 0.51, 1.0]
    made = from_mapping(
        Space, {"method": "pca", "rows": 5, "x": at, "y": at, "labels": ["a", "a", "b", "a", "a"], "images": []}
    )
    assert "same label for 60%" in space_view(made, Budget()).said
    alone = from_mapping(Space, {"method": "pca", "rows": 1, "x": [0.5], "y": [0.5]})
    assert space_view(alone, Budget()).said == "1 of 1 vectors by principal components."
    assert space_view(alone, Budget()).dots[0].look == 0


def test_overlap_is_that_of_the_samples_where_bins_are_fine() -> None:
    rng = np.random.default_rng(0)
    positives, negatives = rng.normal(0.5, 0.1, 4000), rng.normal(0.3, 0.15, 9000)
    edges = np.linspace(-1, 1.5, 2001)
    counts = [np.histogram(values, edges)[0].astype(float) for values in (positives, negatives)]
    _, more = overlap(*counts)
    truth = roc_auc_score([1] * 4000 + [0] * 9000, np.concatenate([positives, negatives]))
    assert more == pytest.approx(truth, abs=1e-3)
    assert overlap(counts[0], counts[0]) == (pytest.approx(1), pytest.approx(0.5))
    assert overlap(np.array([0.0, 5.0]), np.array([7.0, 0.0])) == (0, 1)


@pytest.mark.parametrize(
    ("positives", "negatives", "words"),
    [
        ([0, 0], [0, 0], "No positive pairs; no negative pairs."),
        ([0, 4], [0, 0], "4 positive pairs, median 0.500; no negative pairs."),
        ([0, 4], [4, 0], "They hardly overlap (0%); a positive pair is more alike than a negative one in 100.0%"),
        (
            [4, 4],
            [4, 4],
            "They overlap for the most part (100%); a positive pair is more alike than a negative one in 50",
        ),
    ],
)
def test_histograms_without_pairs_or_without_doubt(positives: list[int], negatives: list[int], words: str) -> None:
    made = Similarities(edges=(-1, 0, 1), positives=tuple(positives), negatives=tuple(negatives))
    assert words in similarity_plot(made, "s").said


def test_of_many_classes_the_worst_are_shown() -> None:
    own = np.linspace(1, 0, 60)
    shares = np.diag(own)
    shares[-1, 0] = 1
    made = confusion_table(Confusion(labels=tuple(f"c{i}" for i in range(60)), shares=tuple(map(tuple, shares))))
    assert made.labels == [f"c{i}" for i in range(60 - MOST, 60)]
    np.testing.assert_allclose(made.shares, shares[-MOST:, -MOST:])
    assert "Shown: the 24 of 60 classes with the fewest of their own." in made.said
    assert "c59 → c0 (100%)" in made.said
    perfect = confusion_table(Confusion(labels=("a",), shares=((1.0,),)))
    assert perfect.said == "Own class: 100% on average, least for a (100%)."


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("results.0.space.x.3", 1.5, "outside the unit square"),
        ("results.0.space.x.3", math.nan, "finite"),
        ("results.0.space.texts", ["a"], "differ in length"),
        ("results.0.similarities.edges", [0, 1, 1, 2], "edges ascend"),
        ("results.0.similarities.positives", [1, -2, 3], "not negative"),
        ("results.0.similarities.negatives", [1], "one count a bin"),
        ("results.0.confusion.shares.1", [0.5, 0.5], "a row and a column"),
        ("results.0.confusion.shares.1.1", 1.5, "between 0 and 1"),
        ("results.0.curves.0.ks", [10, 1, 100], "cut-offs ascend"),
        ("results.0.curves.0.systems.bm25", [0.1], "1 values for 3 cut-offs"),
        ("results.0.diagnostics.trained.rankme", math.inf, "finite"),
    ],
)
def test_what_does_not_fit_together_is_refused(path: str, value: Any, message: str) -> None:
    data = shown()
    put(data, path, value)
    with pytest.raises(ConfigError, match=message):
        from_mapping(Report, data)


def test_a_broken_picture_on_the_map_is_refused() -> None:
    data = shown()
    data["results"][0]["space"]["images"][1] = b"GIF89a, or so it says"
    with pytest.raises(ImageError):
        render(from_mapping(Report, data))
