"""The page of a sweep: all that was tried is on it, told apart, and nothing of it runs or loads anything."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rayemb.tune.page import render, write_page
from rayemb.tune.plots import Axis, axis_of
from rayemb.tune.results import SweepRecord


def trial(number: int, temperature: float, recall: float | None, **other: Any) -> dict[str, Any]:
    metrics = {} if recall is None else {"val/recall@1": recall, "latency_ms": 10.0 * temperature, "val/rankme": recall}
    return {
        "id": f"{number:02d}",
        "settings": {"loss.temperature": temperature, "loss.name": ["infonce", "siglip"][number % 2]},
        "state": "finished",
        "metrics": metrics,
        "curve": [{"step": step, "val/recall@1": recall} for step in (10, 20)] if recall is not None else [],
        **other,
    }


def sweep(**changes: Any) -> SweepRecord:
    data = {
        "name": "sweep-1",
        "created": datetime(2026, 1, 31, tzinfo=UTC),
        "search": {"loss.temperature": "loguniform(0.005, 0.5)", "loss.name": "choice(['infonce', 'siglip'])"},
        "objectives": [{"name": "val/recall@1", "mode": "max"}, {"name": "latency_ms", "mode": "min"}],
        "searcher": "optuna",
        "scheduler": "asha",
        "state": "finished",
        "trials": [
            trial(0, 0.01, 0.2),
            trial(1, 0.1, 0.5),
            trial(2, 0.4, 0.31, state="pruned"),
            trial(3, 0.3, None, state="failed", error="loss is <NaN> & more", attempts=3),
        ],
        "best": ["00", "01"],
    }
    return SweepRecord.model_validate({**data, **changes})


def test_every_trial_is_told_with_its_state_settings_and_error() -> None:
    page = render(sweep(), best_yaml="train:\n  loss: <x>\n")
    rows = re.findall(r'<tr class="(\w+)"><th scope="row">(\w+)</th>', page)
    assert rows == [("best", "01"), ("best", "00"), ("pruned", "02"), ("failed", "03")]
    assert "failed, 3 attempts" in page
    assert "loss is &lt;NaN&gt; &amp; more" in page
    assert "loss: &lt;x&gt;" in page
    assert "4 trials: 2 finished, 1 pruned, 1 failed." in page


def test_the_plots_say_their_figures_to_those_who_cannot_see_them() -> None:
    page = render(sweep(), watch=["val/rankme", "val/unknown"])
    labels = re.findall(r'aria-label="([^"]+)"', page)
    assert any(
        label.startswith("Parallel coordinates of 3 trials, best first: loss.temperature 0.1") for label in labels
    )
    assert "val/recall@1 over loss.temperature: 0.200 at 0.01, 0.500 at 0.1, 0.310 at 0.4." in labels
    assert any(label.startswith("val/rankme over loss.temperature") for label in labels)
    assert not any("val/unknown" in label for label in labels)
    assert any(label.startswith("val/recall@1 over latency_ms; on the front: 0.100 with 0.200") for label in labels)


def test_the_page_is_one_file_without_scripts_or_addresses(tmp_path: Path) -> None:
    write_page(str(tmp_path), sweep())
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#|trials\.json)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": [], "best": [], "state": "running"},
        {"trials": [trial(0, 0.1, None, state="running")], "best": []},
        {"trials": [trial(0, 0.1, 0.5)], "best": ["00"]},
        {"trials": [trial(0, 0.1, 0.5), trial(1, 0.1, 0.5)], "best": ["00"]},
        {"search": {}, "trials": [{**trial(0, 0.1, 0.5), "settings": {}}], "best": ["00"]},
    ],
)
def test_a_sweep_with_little_to_show_has_a_page_too(changes: dict[str, Any]) -> None:
    assert "Sweep sweep-1" in render(sweep(**changes))


def test_axes_are_logarithmic_where_the_space_is() -> None:
    record = sweep()
    axis = axis_of(record, "loss.temperature")
    assert axis.log
    assert axis.share(0.01) == 0
    assert axis.share(0.4) == 1
    assert axis.share(0.0632455532) == pytest.approx(0.5)
    uniform = sweep(search={"loss.temperature": "uniform(0.0, 0.5)"})
    assert not axis_of(uniform, "loss.temperature").log
    grid = sweep(search={"loss.temperature": "grid_search([0.01, 0.1, 0.4])"})
    assert axis_of(grid, "loss.temperature").log


def test_what_is_no_number_has_places() -> None:
    axis = Axis("loss.name", ["siglip", "infonce", None, True])
    assert axis.categories == ["True", "infonce", "siglip"]
    assert axis.at("siglip") == 2
    assert Axis("x", [3, 3]).share(3) == 0.5
