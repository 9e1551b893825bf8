"""`rayemb data inspect`: figures against naive counts, bounded cost, and a page that shows hostile rows harmlessly."""

import base64
import html.parser
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from rayemb.config import from_mapping
from rayemb.data import CorpusError, build_corpus
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.inspect import inspect, render, show
from rayemb.pipeline.survey import Histogram, Survey, survey_corpus, survey_source
from tests.data.corpora import png, write_corpus

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "{{ 7 * 7 }} [bold red]markup[/] \x1b[31m",
    "javascript:alert(3)",
    "\u202eright to left",
    "x" * 1900,
    "</style><style>*{display:none}",
    "https://example.org/a.png",
]


def lines() -> list[dict[str, Any]]:
    good = [
        {
            "id": f"good {n}",
            "image": f"{n % 23}.png",
            "text": f"text {n % 31} {'long ' * (n % 7)}",
            "part": ["train", "val"][n % 3 == 0],
        }
        for n in range(60)
    ]
    good += [{"id": text, "image": f"{n}.png", "text": text, "part": "train"} for n, text in enumerate(HOSTILE)]
    bad = [{"id": f"<b>bad {n}</b>", "image": "none.png", "text": "t", "part": "train"} for n in range(3)]
    return [*good, *bad, {"id": "empty", "image": "1.png", "text": " ", "part": "train"}]


@pytest.fixture(scope="module")
def config(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose corpus has been built."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "images").mkdir()
    for n in range(30):
        (folder / f"images/{n}.png").write_bytes(png(n, size=4 + n))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines())))
    source = {"name": "jsonl", "uri": str(folder / "rows.jsonl"), "image_root": str(folder / "images")}
    corpus = {"source": {**source, "columns": {"split": "part"}}, "max_bad_fraction": 0.2, "row_group_rows": 8}
    run = from_mapping(RunConfig, {"workspace": str(folder / "run"), "corpus": corpus})
    build_corpus(run.corpus, run.uri("corpus"))
    return run


def check_figures(survey: Survey) -> None:
    good = [line for line in lines() if line["image"] != "none.png" and line["text"].strip()]
    assert survey.rows == len(good) == sum(split.rows for split in survey.splits)
    assert {split.name: split.rows for split in survey.splits} == Counter(line["part"] for line in good)
    assert (survey.bad_rows, survey.reasons) == (4, {"missing_image": 3, "empty_text": 1})
    found = {each.what: (each.rows, each.distinct) for each in survey.duplicates}
    texts = [" ".join(line["text"].split()).casefold() for line in good]
    pictures = [line["image"] for line in good]
    assert found == {
        "texts": (68, len(set(texts))),
        "images": (68, len(set(pictures))),
        "pairs": (68, len(set(zip(texts, pictures, strict=True)))),
    }
    assert 0 < found["pairs"][1] <= 68
    histograms = {f"{each.name} {each.unit}": each for each in survey.histograms}
    assert set(histograms) == {
        *(
            "text length characters",
            "text length words",
            "image width pixels",
            "image height pixels",
            "image file bytes",
        )
    }
    lengths = sorted(len(line["text"].strip()) for line in good)
    assert (histograms["text length characters"].smallest, histograms["text length characters"].largest) == (
        lengths[0],
        lengths[-1],
    )
    assert histograms["text length characters"].median == (lengths[33] + lengths[34]) / 2
    assert sum(histograms["image width pixels"].counts) == 68
    assert survey.formats == {"PNG": 68}
    widths = Counter(f"{4 + int(name[:-4])} x {4 + int(name[:-4])}" for name in pictures)
    assert all(widths[size] == count for size, count in survey.sizes)
    assert survey.sizes[0][1] == max(widths.values())


def test_the_figures_of_a_corpus(config: RunConfig) -> None:
    survey = survey_corpus(config.uri("corpus"))
    check_figures(survey)
    assert survey.duplicates_of == "all rows"
    assert {row["reason"] for row in survey.bad} == {"missing_image", "empty_text"}


def test_the_figures_of_a_source(config: RunConfig) -> None:
    check_figures(survey_source(config.corpus))


def test_a_sample_is_bounded_and_seeded(config: RunConfig) -> None:
    survey = survey_corpus(config.uri("corpus"), sample_rows=20)
    assert survey.sample_rows == 20
    assert survey.rows == 68  # counts and duplicates are exact all the same
    assert survey.duplicates == survey_corpus(config.uri("corpus")).duplicates
    assert survey == survey_corpus(config.uri("corpus"), sample_rows=20)
    assert survey_source(config.corpus, sample_rows=10).sample_rows <= 10


@pytest.mark.parametrize("values", [[0], [1], [0, 0, 5], list(range(200)), [7] * 9, [1, 10**9]])
def test_bins_hold_what_is_between_their_edges(values: list[int]) -> None:
    histogram = Histogram.of("x", "y", values)
    assert histogram is not None
    assert len(histogram.edges) == len(histogram.counts) + 1
    for number, count in enumerate(histogram.counts):
        low, high = histogram.edges[number], histogram.edges[number + 1]
        assert count == sum(low <= value < high for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.counts[0] > 0
    assert histogram.counts[-1] > 0
    assert Histogram.of("x", "y", []) is None


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_harmless(config: RunConfig, tmp_path: Path) -> None:
    out = io.StringIO()
    target = tmp_path / "page.html"
    inspect(config, Console(file=out, width=200), html=str(target), verify=True)
    page = Page(target.read_text())
    assert page.tags["script"] == 0
    assert page.tags["style"] == 1
    assert not any(name.startswith("on") for name, _ in page.attributes)
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == page.tags["img"] > 5
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/webp;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 160
    assert not [value for name, value in page.attributes if name == "href"]
    assert not re.search(r"url\(|@import", target.read_text())
    for name in ("train", "val", "missing_image", "empty_text", "PNG", "digest", "every one right"):
        assert name in page.text
    assert page.tags["svg"] == 5
    shown = out.getvalue()
    assert "68 rows; set aside 4 (missing_image 3, empty_text 1)" in shown
    assert "█" in shown
    assert f"page {target}" in shown


def test_hostile_rows_are_shown_as_they_are(config: RunConfig) -> None:
    survey = survey_corpus(config.uri("corpus"))
    rows = [{**survey.sample[0], "text": text, "id": text, "query": text, "concept": text} for text in HOSTILE]
    survey.sample = rows
    survey.title = HOSTILE[0]
    text = render(survey)
    page = Page(text)
    assert page.tags["script"] == 0
    assert page.tags["img"] == len(rows)
    assert HOSTILE[0] in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert len(text) < 200_000
    assert "x" * 301 not in text
    out = io.StringIO()
    show(survey, Console(file=out, width=300, force_terminal=False))
    assert "[bold red]markup[/]" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "\u202e" not in out.getvalue()


def test_which_of_the_two_is_looked_at(config: RunConfig, tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    assert inspect(config, quiet).title.startswith("corpus ")
    assert inspect(config, quiet, source=True).title.startswith("source ")
    elsewhere = config.model_copy(update={"workspace": str(tmp_path)})
    assert inspect(elsewhere, quiet).title.startswith("source ")  # there is no corpus yet
    nothing = from_mapping(RunConfig, {"workspace": str(tmp_path)})
    with pytest.raises(CorpusError, match="no corpus here"):
        inspect(nothing, quiet)


def test_checksums_are_compared_when_asked(tmp_path: Path) -> None:
    run = from_mapping(RunConfig, {"workspace": str(tmp_path)})
    write_corpus(tmp_path / "corpus", {"train": [6]})
    assert inspect(run, Console(file=io.StringIO()), verify=True).rows == 6
    manifest = json.loads((tmp_path / "corpus/_corpus.json").read_text())
    manifest["splits"]["train"]["files"][0]["sha256"] = "0" * 64
    (tmp_path / "corpus/_corpus.json").write_text(json.dumps(manifest))
    assert inspect(run, Console(file=io.StringIO())).rows == 6  # only asked for: it reads every byte
    with pytest.raises(CorpusError, match="checksum of the shard differs"):
        inspect(run, Console(file=io.StringIO()), verify=True)


def test_texts_alone_and_pairs_of_texts(tmp_path: Path) -> None:
    rows = [{"id": n, "ask": f"q {n % 3}", "text": f"t {n % 4}"} for n in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for query, expected in (("ask", {"texts": 4, "queries": 3, "pairs": 12}), (None, {"texts": 4})):
        source = {"name": "jsonl", "uri": str(tmp_path), "columns": {"image": None, "query": query}}
        run = from_mapping(RunConfig, {"workspace": str(tmp_path / "run"), "corpus": {"source": source}})
        survey = inspect(run, Console(file=io.StringIO()))
        assert {each.what: each.distinct for each in survey.duplicates} == expected
        assert not survey.formats
        assert Page(render(survey)).tags["img"] == 0
