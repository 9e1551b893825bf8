"""The report: what is in `metrics.json` is on the page, and nothing on the page comes from elsewhere."""

import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib._pylab_helpers import Gcf
from PIL import Image

from rayemb import storage
from rayemb.config import ConfigError, from_mapping
from rayemb.evaluate import report as report_module
from rayemb.evaluate.report import Estimate, Report, render, write_report
from rayemb.models.images import ImageError

VOID = {"meta", "img", "br", "link", "input", "hr"}
METRICS = ["recall@1", "recall@5", "recall@10", "mrr"]
EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7*7 }}-->"


def picture(colour: str, size: tuple[int, int] = (24, 24), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, **({"format": "PNG"} | options))
    return out.getvalue()


def estimates(base: float, width: float | None) -> dict[str, Any]:
    """Four different figures, no two in the report alike."""
    values = {name: base * (1 + number / 7) for number, name in enumerate(METRICS)}
    if width is None:
        return {name: {"value": value} for name, value in values.items()}
    return {name: {"value": v, "low": v - width, "high": v + width} for name, v in values.items()}


def direction(name: str, trained: float) -> dict[str, Any]:
    return {
        "direction": name,
        "queries": 1234,
        "candidates": 5678,
        "systems": [
            {"system": "trained", "metrics": estimates(trained, 0.0313)},
            {"system": "untrained", "metrics": estimates(0.0211, 0.0037)},
            {"system": "chance", "metrics": estimates(0.00031, None)},
        ],
        "difference": {"system": "trained", "baseline": "untrained", "metrics": estimates(-0.0472, 0.0099)},
    }


def sample() -> dict[str, Any]:
    return {
        "title": "Emoji search",
        "created": "2025-11-21T04:05:06Z",
        "model_digest": "ab" * 32,
        "corpus": {"name": "emoji", "uri": "s3://bucket/emoji", "rows": {"train": 9517, "zero_shot": 643}},
        "facts": {"workers": 2, "parameters": "2.1 M"},
        "config": "model:\n  dim: 128\n",
        "training": [
            {
                "step": step,
                "loss": 6.5 - step / 40,
                "temperature": 0.07 - step / 4000,
                "learning_rate": 0.0005,
                "seconds": step * 1.5,
            }
            for step in range(0, 100, 10)
        ],
        "method": "Bootstrap over concepts.",
        "results": [
            {
                "split": "zero_shot",
                "description": "Concepts never seen.",
                "directions": [direction("image→text", 0.4123), direction("text→image", 0.3734)],
            },
            {"split": "style_held_out", "directions": [direction("text→image", 0.5217)]},
        ],
        "examples": [
            {
                "split": "zero_shot",
                "direction": "text→image",
                "text": "red heart",
                "rank": 2,
                "hits": [
                    {"caption": "blue heart", "image": picture("blue"), "score": 0.8123, "relevant": False},
                    {"caption": "heart, red", "image": picture("red"), "score": 0.7345, "relevant": True},
                ],
            },
            {
                "split": "zero_shot",
                "direction": "image→text",
                "text": "a circle",
                "image": picture("green"),
                "hits": [{"caption": "circle", "score": 0.91, "relevant": True}],
            },
        ],
        "examples_note": "Drawn by seed.",
        "notes": ["Drawings are not photographs."],
    }


class Page(HTMLParser):
    """Elements and visible text; fails on a tag that is not closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    uri = write_report(str(folder), sample())
    assert uri == str(folder / "index.html")
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "metrics.json"]
    html = (folder / "index.html").read_text(encoding="utf-8")
    return Page(html), html, json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def numbers(document: Any) -> list[float]:
    if isinstance(document, dict):
        return [n for value in document.values() for n in numbers(value)]
    if isinstance(document, list):
        return [n for value in document for n in numbers(value)]
    return [document] if isinstance(document, int | float) and not isinstance(document, bool) else []


def as_shown(value: float) -> str:
    size = abs(value)
    return f"{size:,}" if isinstance(value, int) else f"{size:.3f}" if size >= 0.01 else f"{size:.2g}"


def test_every_figure_of_the_metrics_is_on_the_page(written: tuple[Page, str, dict[str, Any]]) -> None:
    page, _, metrics = written
    shown = re.findall(r"[\d.,]*\d(?:e-\d+)?", page.text)
    figures = [n for key in ("results", "examples", "corpus") for n in numbers(metrics[key])]
    assert len(figures) > 100
    for figure in figures:
        assert as_shown(figure) in shown, figure
    for point in metrics["training"]:
        row = [str(point["step"]), as_shown(point["loss"]), as_shown(point["temperature"]), "0.0005"]
        assert " ".join(row) in page.text


def test_the_figures_stand_in_their_cells(written: tuple[Page, str, dict[str, Any]]) -> None:
    page, _, _ = written
    assert "trained 0.412 0.381 to 0.444 0.471 0.440 to 0.50" in page.text
    assert "chance 0.00031 0.00035 0.0004 0.00044" in page.text
    assert "trained − untrained −0.047 −0.057 to −0.037" in page.text
    assert "image→text · 1,234 queries, 5,678 candidates" in page.text


def test_metrics_hold_everything_but_the_pictures(written: tuple[Page, str, dict[str, Any]]) -> None:
    _, _, metrics = written
    expected = sample()
    for example in expected["examples"]:
        example.pop("image", None)
        for hit in example["hits"]:
            hit.pop("image", None)
    assert from_mapping(Report, metrics) == from_mapping(Report, expected)
    assert metrics["format"] == 1
    assert metrics["results"][0]["directions"][0]["systems"][2]["metrics"]["mrr"]["low"] is None


def test_the_page_needs_nothing_from_elsewhere(written: tuple[Page, str, dict[str, Any]]) -> None:
    page, html, _ = written
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:image/webp;base64,", "#")) or value == "metrics.json"
            assert not name.startswith("on")
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    rest = re.sub(r"data:image/webp;base64,[^\"]+", "", html).replace("s3://bucket", "")
    assert not re.search(r"https?:|@import|//[a-z]|data:", rest.replace("img-src data:", ""))
    assert not page.all("script")
    assert not page.all("link")
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_pictures_and_plots_have_words_for_those_who_do_not_see_them(
    written: tuple[Page, str, dict[str, Any]],
) -> None:
    page, html, _ = written
    assert [image["alt"] for image in page.all("img")] == ["blue heart", "heart, red", "query: a circle"]
    plots = page.all("svg")
    assert [plot["role"] for plot in plots] == ["img"] * 3
    assert "image→text, recall@1: trained 0.412, untrained 0.021, chance 0.00031" in plots[0]["aria-label"]
    assert "Loss from 6.500 at step 0 to 4.250 at step 90" in plots[2]["aria-label"]
    # Relevance is said in words and by the kind of frame, not by colour alone.
    assert page.text.count("✓ relevant") == 2
    assert page.text.count("✗ other") == 1
    assert re.search(r"\.hit \{[^}]*dashed", html)
    assert re.search(r"\.hit\.yes \{[^}]*solid", html)
    assert page.all("html")[0]["lang"] == "en"
    assert all("scope" in cell for cell in page.all("th"))


def test_ids_are_unique_and_plots_wear_the_colours_of_the_page(
    written: tuple[Page, str, dict[str, Any]],
) -> None:
    page, html, _ = written
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    links = [value[1:] for _, a in page.elements for key, value in a.items() if key.endswith("href") and "#" in value]
    assert set(links) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    plots = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.S))
    assert not re.search(r"#[0-9a-fA-F]{6}\b", plots)
    assert "prefers-color-scheme: dark" in html
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used <= set(re.findall(r"(--[\w-]+):", html))


def test_a_report_renders_the_same_twice_and_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    report = from_mapping(Report, sample())
    assert render(report) == render(report)
    assert dict(matplotlib.rcParams) == before
    assert Gcf.get_all_fig_managers() == []


def poisoned(value: Any, path: str = "") -> Any:
    """Every string of the report replaced, but for those that have a form to keep."""
    if isinstance(value, dict):
        return {
            (EVIL + k if path.endswith(("rows", "facts")) else k): poisoned(v, f"{path}.{k}") for k, v in value.items()
        }
    if isinstance(value, list):
        return [poisoned(v, path) for v in value]
    return EVIL if isinstance(value, str) and path != ".created" else value


def test_text_from_the_data_is_never_markup() -> None:
    html = render(from_mapping(Report, poisoned(sample())))
    page = Page(html)
    clean = Page(render(from_mapping(Report, sample())))
    kinds = [(tag, sorted(a)) for tag, a in page.elements if tag not in ("path", "g", "use", "defs")]
    assert kinds == [(tag, sorted(a)) for tag, a in clean.elements if tag not in ("path", "g", "use", "defs")]
    assert not page.all("script")
    assert "alert(1)</script>" not in html
    assert page.text.count("{{ 7*7 }}") > 20
    assert page.all("img")[0]["alt"] == EVIL


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    """matplotlib reads `$...$` as mathematics and fails on what is none."""
    data = sample()
    data["results"][0]["directions"][0]["direction"] = r"$\frac$ to $x"
    for system in data["results"][1]["directions"][0]["systems"]:
        system["metrics"] = {r"$\bad{$": {"value": 0.5}}
    data["results"][1]["directions"][0]["difference"] = None
    assert r"$\frac$ to $x" in Page(render(from_mapping(Report, data))).text


def put(data: dict[str, Any], path: str, value: float) -> None:
    *parents, leaf = [int(part) if part.isdigit() else part for part in path.split(".")]
    target: Any = data
    for part in parents:
        target = target[part]
    target[leaf] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path",
    [
        "training.3.loss",
        "training.3.temperature",
        "results.0.directions.1.systems.0.metrics.mrr.value",
        "results.0.directions.1.systems.0.metrics.mrr.high",
        "results.0.directions.1.difference.metrics.recall@5.low",
        "examples.0.hits.1.score",
        "facts.workers",
    ],
)
def test_a_number_that_is_none_is_refused_by_name(tmp_path: Path, path: str, value: float) -> None:
    data = sample()
    put(data, path, value)
    with pytest.raises(ConfigError) as error:
        write_report(str(tmp_path / "report"), data)
    assert any(key.startswith(path) for key, _ in error.value.problems)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part["systems"][0]["metrics"]["mrr"].pop("low"), "two ends"),
        (lambda part: part["systems"][0]["metrics"]["mrr"].update(low=0.9, high=0.1), "upside down"),
        (lambda part: part["systems"][1]["metrics"].pop("mrr"), "'untrained' has metrics"),
        (
            lambda part: part["difference"]["metrics"].update({"map": {"value": 0.1}}),
            "difference has metrics",
        ),
        (lambda part: part.update(systems=[]), "at least 1"),
        (lambda part: part.update(querys=3), "unknown key"),
    ],
)
def test_results_that_do_not_fit_together_are_refused(change: Any, message: str) -> None:
    data = sample()
    change(data["results"][0]["directions"][0])
    with pytest.raises(ConfigError, match=message):
        from_mapping(Report, data)


def test_a_broken_picture_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    data = sample()
    data["examples"][0]["hits"][0]["image"] = b"GIF89a, or so it says"
    with pytest.raises(ImageError):
        write_report(str(tmp_path / "report"), data)
    assert not (tmp_path / "report").exists()


def test_pictures_are_small_copies_without_their_metadata() -> None:
    data = sample()
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    big = picture("red", (2000, 1000), format="JPEG", exif=exif)
    assert b"taken at home" in big
    data["examples"] = data["examples"][1:]
    data["examples"][0]["image"] = big
    (source,) = [image["src"] for image in Page(render(from_mapping(Report, data))).all("img")]
    small = base64.b64decode(source.split(",")[1])
    assert b"taken at home" not in small
    assert Image.open(io.BytesIO(small)).size == (160, 80)


def test_the_page_is_published_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sees the page finds the metrics that it links to."""
    uri = str(tmp_path / "report")

    def refuse(target: str, data: bytes) -> None:
        raise storage.StorageError("disk full", where=target)

    monkeypatch.setattr(report_module.storage, "write_bytes", refuse)
    with pytest.raises(storage.StorageError, match=r"index\.html: disk full"):
        write_report(uri, sample())
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["metrics.json"]


def test_the_barest_report_is_a_page() -> None:
    keys = ("title", "created", "model_digest")
    data = {key: sample()[key] for key in keys} | {"corpus": {"name": "c", "uri": "u"}}
    page = Page(render(from_mapping(Report, data)))
    assert "Emoji search" in page.text
    assert not page.all("svg")
    assert "2025-11-21 04:05 UTC" in page.text


@pytest.mark.parametrize("points", [1, 2, 39, 400])
def test_any_number_of_training_points(points: int) -> None:
    data = sample()
    data["training"] = [{"step": step, "loss": 1.5} for step in range(points)]
    data["results"] = data["examples"] = []
    page = Page(render(from_mapping(Report, data)))
    assert f"{min(points, 20)} of {points} records" in page.text
    assert len(page.all("tr")) == 1 + min(points, 20)
    assert "Temperature" not in page.all("svg")[0]["aria-label"]


def test_a_report_object_is_written_as_its_mapping_is(tmp_path: Path) -> None:
    write_report(str(tmp_path / "a"), sample())
    write_report(str(tmp_path / "b"), from_mapping(Report, copy.deepcopy(sample())))
    for name in ("index.html", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_estimates_of_numpy_are_plain_numbers() -> None:
    import numpy as np

    assert Estimate(value=np.float32(0.5)).model_dump(mode="json") == {
        "value": 0.5,
        "low": None,
        "high": None,
    }
