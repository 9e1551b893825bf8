"""The gate: no code in a requirement, no surprise after the work, no failure that CI does not see."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb import storage
from rayemb.config import from_mapping
from rayemb.evaluate import EvaluateConfig
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.gate import Gate, Place, check, figures_of, judge, junit_xml, parse
from rayemb.evaluate.report import Report, read_report, write_report
from rayemb.evaluate.run import yields
from tests.evaluate.test_report import EVIL, direction, estimates, sample


def report() -> Report:
    data = sample()
    data["results"][0]["diagnostics"] = {"trained": {"rankme": 87.5}, "untrained": {"rankme": 3.0}}
    return from_mapping(Report, data)


def one(text: str) -> list[tuple[str, float | None, bool]]:
    return [(each.place.path, each.measured, each.passed) for each in judge([parse(text)], figures_of(report()))]


@pytest.mark.parametrize(
    ("text", "name", "gain", "end", "sign", "bound"),
    [
        ("recall@10>=0.6", "recall@10", False, "value", ">=", 0.6),
        (" recall@10  <  .5 ", "recall@10", False, "value", "<", 0.5),
        ("zero_shot/image->text/recall@10>-1e-2", "zero_shot/image→text/recall@10", False, "value", ">", -0.01),
        ("image→text/mrr<=1", "image→text/mrr", False, "value", "<=", 1.0),
        ("low(recall@10)>=0.55", "recall@10", False, "low", ">=", 0.55),
        ("high( mrr )<0.9", "mrr", False, "high", "<", 0.9),
        ("gain(recall@10)>0", "recall@10", True, "value", ">", 0.0),
        ("low(gain(task/recall@10)) > +0.01", "task/recall@10", True, "low", ">", 0.01),
    ],
)
def test_requirements_are_read(text: str, name: str, gain: bool, end: str, sign: str, bound: float) -> None:
    found = parse(text)
    assert (found.name, found.gain, found.end, found.sign, found.bound) == (name, gain, end, sign, bound)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "recall@10",
        "recall@10=0.6",
        "recall@10==0.6",
        "recall@10=>0.6",
        ">=0.6",
        "recall@10>=",
        "recall@10>=nan",
        "recall@10>=inf",
        "recall@10>=1e999",
        "recall@10>=0.6 or 1>0",
        "gain(low(recall@10))>0",
        "low(low(recall@10))>0",
        "gain(gain(mrr))>0",
        "low()>0",
        "mean(recall@10)>0",
        "__import__('os').system('true')>0",
        "low(recall@10>0",
        "0.5<recall@10",
    ],
)
def test_what_is_no_requirement_is_said_with_its_text(text: str) -> None:
    with pytest.raises(EvaluateError) as error:
        parse(text)
    assert repr(text) in str(error.value)
    assert "recall@10>=0.6" in error.value.fix


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(EvaluateError):
        assert math.isfinite(parse(text).bound)


def test_a_name_asks_for_every_figure_that_it_fits() -> None:
    everywhere = one("recall@1>=0.4")
    assert everywhere == [
        ("zero_shot/image→text/recall@1", 0.4123, True),
        ("zero_shot/text→image/recall@1", 0.3734, False),
        ("style_held_out/text→image/recall@1", 0.5217, True),
    ]
    assert one("zero_shot/recall@1>=0.4") == everywhere[:2]
    assert one("text->image/recall@1>=0.4") == everywhere[1:]
    assert one("style_held_out/text->image/recall@1>=0.4") == everywhere[2:]
    # What is not there fails, whatever is asked of it.
    assert one("recall@7>=0") == [("recall@7", None, False)]


def test_ends_of_intervals_and_gains_are_those_of_the_report() -> None:
    place = "zero_shot/image→text/recall@1"
    at = {path: measured for path, measured, _ in one("low(recall@1)>=0")}
    assert at[place] == pytest.approx(0.4123 - 0.0313)
    at = {path: measured for path, measured, _ in one("high(recall@1)>=0")}
    assert at[place] == pytest.approx(0.4123 + 0.0313)
    assert one("gain(image->text/recall@1)>0") == [(place, -0.0472, False)]
    assert one("low(gain(image->text/recall@1))>-0.1") == [(place, -0.0472 - 0.0099, True)]
    assert one("rankme>=87.5") == [("zero_shot/rankme", 87.5, True)]
    assert one("low(rankme)>0") == [("zero_shot/rankme", None, False)]
    assert one("gain(rankme)>0") == [("zero_shot/rankme", None, False)]


@pytest.mark.parametrize(("sign", "passed"), [(">=", True), (">", False), ("<=", True), ("<", False)])
def test_a_figure_on_its_bound(sign: str, passed: bool) -> None:
    assert one(f"image->text/recall@1{sign}0.4123")[0][2] is passed


def test_a_gain_on_another_system_is_not_the_models() -> None:
    data = sample()
    data["results"] = [{"split": "s", "directions": [direction("image→text", 0.4)]}]
    data["results"][0]["directions"][0]["difference"]["system"] = "untrained"
    outcomes = judge([parse("gain(mrr)>-1")], figures_of(from_mapping(Report, data)))
    assert [each.measured for each in outcomes] == [None]


def test_what_will_not_be_measured_is_refused_before_the_work() -> None:
    offered = yields(EvaluateConfig(splits=["zero_shot", "held_out"], ks=(1, 10)), ["train", "zero_shot"])
    assert [place.path for place in offered] == [
        f"zero_shot/{way}/{metric}"
        for way in ("image→text", "text→image")
        for metric in ("recall@1", "recall@10", "mrr")
    ]
    check(map(parse, ("recall@10>0", "zero_shot/mrr>0", "low(gain(image->text/recall@1))>0")), offered)
    for text, name in (("recal@10>0", "recall@10"), ("recall@5>0", "recall@1"), ("held_out/mrr>0", "mrr")):
        with pytest.raises(EvaluateError) as error:
            check([parse(text)], offered)
        assert repr(parse(text).name) in error.value.what
        assert repr(text) in error.value.where
        assert name in error.value.fix
    with pytest.raises(EvaluateError, match="no baseline"):
        check([parse("gain(mrr)>0")], offered, baseline=False)
    bare = [Place("zero_shot", "", "rankme")]
    check([parse("rankme>0")], offered, bare=bare)
    for text in ("low(rankme)>0", "gain(zero_shot/rankme)>0"):
        with pytest.raises(EvaluateError, match="neither an interval nor a gain"):
            check([parse(text)], offered, bare=bare)
    many = [Place(f"task-{n}", "", "map") for n in range(100)]
    with pytest.raises(EvaluateError, match="and 71 more"):
        check([parse("ndcg>0")], many)


def test_each_outcome_is_one_line_with_the_figure_and_what_is_missing() -> None:
    requirements = [parse("zero_shot/image->text/recall@1>=0.6"), parse("low(gain(style_held_out/mrr))>0")]
    lines = [each.line for each in judge(requirements, figures_of(report()))]
    assert lines[0] == "zero_shot/image->text/recall@1>=0.6: zero_shot/image→text/recall@1 is 0.412, 0.188 off"
    assert lines[1].startswith(
        "low(gain(style_held_out/mrr))>0: lower end of the gain of style_held_out/text→image/mrr is -"
    )
    outcome = judge([parse("image->text/recall@1>0.4123")], figures_of(report()))[0]
    assert outcome.line.endswith("is 0.412, which is not enough")


def test_the_junit_file_says_what_failed_and_is_xml_whatever_the_names(tmp_path: Path) -> None:
    data = sample()
    data["title"] = f"{EVIL}\x00\x1b\ufffe"
    data["results"][0]["split"] = EVIL
    made = from_mapping(Report, data)
    gate = Gate.of(["image->text/recall@1>=0.4", "text->image/recall@1>=0.4"], str(tmp_path / "new" / "junit.xml"))
    outcomes = gate.judge(made)
    root = ElementTree.fromstring((tmp_path / "new" / "junit.xml").read_bytes())
    suite = root.find("testsuite")
    assert suite is not None
    assert {key: suite.get(key) for key in ("tests", "failures", "errors")} == {
        "tests": "3",
        "failures": "1",
        "errors": "0",
    }
    cases = suite.findall("testcase")
    assert [case.find("failure") is None for case in cases] == [each.passed for each in outcomes] == [True, False, True]
    assert cases[0].get("classname") == EVIL
    assert cases[0].get("name") == f"image->text/recall@1>=0.4 ({EVIL}/image→text/recall@1)"
    failure = cases[1].find("failure")
    assert failure is not None
    assert failure.get("message") == outcomes[1].line
    assert junit_xml(made, outcomes) == junit_xml(made, outcomes)
    assert not list((tmp_path / "new").glob("*.tmp*"))


def test_an_outcome_that_nobody_asked_for_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="nothing is required"):
        Gate.of([], str(tmp_path / "junit.xml"))
    assert Gate.of() == Gate()


def test_a_report_is_read_again_without_its_pictures(tmp_path: Path) -> None:
    write_report(str(tmp_path / "report"), sample())
    found = read_report(str(tmp_path / "report"))
    assert figures_of(found) == figures_of(from_mapping(Report, sample()))
    with pytest.raises(EvaluateError, match="there is no report"):
        read_report(str(tmp_path))
    for text, told in (('{"format": 2}', "format"), ("[]", "expected an object")):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(EvaluateError, match=f"no report of this version.*{told}"):
            read_report(str(tmp_path))
    document: dict[str, Any] = json.loads((tmp_path / "report" / "metrics.json").read_text())
    document["results"][0]["directions"][0]["systems"][0]["metrics"] = estimates(0.1, None) | {"x": {"value": 1}}
    (tmp_path / "metrics.json").write_text(json.dumps(document))
    with pytest.raises(EvaluateError, match="has metrics"):
        read_report(str(tmp_path))


def test_a_store_that_fails_is_no_report_that_passes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(storage.StorageError):
        Gate.of(["mrr>0"], str(tmp_path / "file" / "junit.xml")).judge(report())
