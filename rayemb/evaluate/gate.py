"""What a model must reach: `recall@10>=0.6`, known to be measurable before the work, judged after it, told to CI."""

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from xml.etree import ElementTree

from rayemb import storage
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.page import figure_text
from rayemb.evaluate.report import Estimate, Report

End = Literal["value", "low", "high"]

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
# The last comparison with a number behind it: names hold `>` themselves, as in image->text.
_REQUIREMENT = re.compile(r"(.+?)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
_CALL = re.compile(r"(low|high|gain)\s*\((.*)\)")
_FORMS = "write it as recall@10>=0.6, task/direction/ndcg@10>0.4, low(recall@10)>=0.55 or low(gain(recall@10))>0"
_TOLD = 30
# What XML 1.0 cannot hold, even escaped.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Place(NamedTuple):
    """Where a figure stands in a report. Empty parts are left out of its name."""

    split: str
    direction: str
    metric: str

    @property
    def path(self) -> str:
        """Its whole name: `zero_shot/image→text/recall@10`."""
        return "/".join(part for part in self if part)

    @property
    def names(self) -> set[str]:
        """All that it is called by: its path, and the path without split or direction."""
        parts = (self, (self.split, self.metric), (self.direction, self.metric), (self.metric,))
        return {"/".join(part for part in of if part) for of in parts}


class Figure(NamedTuple):
    """What was measured, and by how much it is more than the baseline's, where there is one."""

    value: Estimate
    gain: Estimate | None = None


@dataclass(frozen=True)
class Requirement:
    """One condition. It holds if every figure of that name meets it."""

    text: str
    name: str
    gain: bool  # of the difference to the baseline, not of the figure
    end: End  # which end of the interval, or the figure itself
    sign: str
    bound: float


@dataclass(frozen=True)
class Outcome:
    """A requirement at one place."""

    requirement: Requirement
    place: Place
    measured: float | None  # None: there is no such interval, or no baseline
    passed: bool

    @property
    def line(self) -> str:
        """What came of it, for people."""
        asked = self.requirement
        what = ("gain of " if asked.gain else "") + self.place.path
        if self.measured is None:
            return f"{asked.text}: {what} {'has no interval' if asked.end != 'value' else 'was not measured'}"
        end = {"value": "", "low": "lower end of the ", "high": "upper end of the "}[asked.end]
        far = abs(self.measured - asked.bound)
        missed = "" if self.passed else f", {figure_text(far)} off" if far else ", which is not enough"
        return f"{asked.text}: {end}{what} is {figure_text(self.measured)}{missed}"


def parse(text: str, where: str = "--require") -> Requirement:
    """A requirement from what a person wrote; nothing of it is evaluated as code.

    `NAME>=NUMBER`, with `>=`, `>`, `<=` or `<`. NAME is a metric, or `task/metric`, `direction/metric`,
    `task/direction/metric` (`->` does for `→`). `low(NAME)` and `high(NAME)` are the ends of its interval, `gain(NAME)`
    the difference to the baseline, `low(gain(NAME))` the lower end of that. Raises EvaluateError naming `where`.
    """
    found = _REQUIREMENT.fullmatch(text.strip())
    if not found:
        raise EvaluateError(f"{text!r} is no requirement", where=where, fix=_FORMS)
    name, sign, number = found[1], found[2], float(found[3])
    calls = []
    while call := _CALL.fullmatch(name.strip()):
        calls.append(call[1])
        name = call[2]
    name = name.strip().replace("->", "→")
    known = [[], ["gain"], ["low"], ["high"], ["low", "gain"], ["high", "gain"]]
    if not name or re.search(r"[()<=>]", name) or calls not in known or not math.isfinite(number):
        raise EvaluateError(f"{text!r} is no requirement", where=where, fix=_FORMS)
    end: End = "low" if "low" in calls else "high" if "high" in calls else "value"
    return Requirement(text.strip(), name, "gain" in calls, end, sign, number)


def check(
    requirements: Iterable[Requirement],
    offered: Iterable[Place],
    *,
    bare: Iterable[Place] = (),
    baseline: bool = True,
    where: str = "--require",
) -> None:
    """Whether all that is required will be measured; for before the work begins.

    `offered`: the figures that the evaluation will yield; `bare`: those that have neither interval nor gain
    (diagnostics); `baseline`: whether there will be one to gain on. Raises EvaluateError naming the metric that will
    not be measured, with those that will.
    """
    bare = list(bare)
    offered = [*offered, *bare]
    bare_names = {name for place in bare for name in place.names}
    known = sorted({name for place in offered for name in place.names}, key=lambda name: (name.count("/"), name))
    for each in requirements:
        if each.name not in known:
            close = difflib.get_close_matches(each.name, known, 3, 0.7)
            rest = [name for name in known if name not in close]
            listed = [*close, *rest][:_TOLD]
            more = f" and {len(known) - len(listed)} more" if len(known) > len(listed) else ""
            raise EvaluateError(
                f"no evaluation here yields {each.name!r}",
                where=f"{where} {each.text!r}",
                fix=f"there are: {', '.join(listed)}{more}" if listed else "nothing is measured",
            )
        if each.name in bare_names and (each.gain or each.end != "value"):
            raise EvaluateError(
                f"{each.name!r} has neither an interval nor a gain",
                where=f"{where} {each.text!r}",
                fix=f"ask for the figure itself: {each.name}{each.sign}{each.bound:g}",
            )
        if each.gain and not baseline:
            raise EvaluateError(
                "there is no baseline to gain on", where=f"{where} {each.text!r}", fix="name one, or ask for the figure"
            )


def judge(requirements: Iterable[Requirement], figures: Mapping[Place, Figure]) -> list[Outcome]:
    """What came of each requirement, at each place that its name fits; what was not measured fails."""
    outcomes = []
    for each in requirements:
        places = [place for place in figures if each.name in place.names] or [Place("", "", each.name)]
        for place in places:
            found = figures.get(place)
            estimate = None if found is None else found.gain if each.gain else found.value
            measured = None if estimate is None else getattr(estimate, each.end)
            passed = measured is not None and _OPERATORS[each.sign](measured, each.bound)
            outcomes.append(Outcome(each, place, measured, passed))
    return outcomes


def figures_of(report: Report) -> dict[Place, Figure]:
    """The figures of the model that a report is of: of the first system of each direction, with its diagnostics."""
    found = {}
    for result in report.results:
        for part in result.directions:
            model = part.systems[0]
            gains = part.difference.metrics if part.difference and part.difference.system == model.system else {}
            for name, estimate in model.metrics.items():
                found[Place(result.split, part.direction, name)] = Figure(estimate, gains.get(name))
        model = result.directions[0].systems[0]
        for name, value in result.diagnostics.get(model.system, {}).items():
            found[Place(result.split, "", name)] = Figure(Estimate(value=value))
    return found


@dataclass(frozen=True)
class Gate:
    """The requirements of one evaluation, and where their outcome is written for CI."""

    requirements: tuple[Requirement, ...] = ()
    junit: str | None = None

    @classmethod
    def of(cls, require: Sequence[str] | None = None, junit: str | None = None) -> "Gate":
        """From what the command line says. Raises EvaluateError for what is no requirement."""
        if junit and not require:
            raise EvaluateError("nothing is required, so there is no outcome to write", where="--junit", fix=_FORMS)
        return cls(tuple(map(parse, require or ())), storage.normalise(junit) if junit else None)

    def check(self, offered: Iterable[Place], *, bare: Iterable[Place] = (), baseline: bool = True) -> None:
        """See `check`: before the work."""
        check(self.requirements, offered, bare=bare, baseline=baseline)

    def judge(self, report: Report) -> list[Outcome]:
        """What came of the requirements; writes the JUnit file if one is asked for. Raises StorageError."""
        outcomes = judge(self.requirements, figures_of(report))
        if self.junit:
            storage.write_bytes(self.junit, junit_xml(report, outcomes))
        return outcomes


def junit_xml(report: Report, outcomes: Sequence[Outcome]) -> bytes:
    """The outcomes as JUnit XML, a test case each: what CI systems show and count."""
    counts = {"tests": str(len(outcomes)), "failures": str(sum(not each.passed for each in outcomes))}
    counts |= {"errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": _xml(report.title), "timestamp": report.created.isoformat(), **counts}
    )
    about = ElementTree.SubElement(suite, "properties")
    for name, value in (("model", report.model_digest), ("corpus", report.corpus.uri)):
        ElementTree.SubElement(about, "property", {"name": name, "value": _xml(value)})
    for each in outcomes:
        place = each.place
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": _xml(place.split or report.title),
                "name": _xml(f"{each.requirement.text} ({place.path})"),
                "time": "0",
            },
        )
        if not each.passed:
            failure = {"message": _xml(each.line), "type": "requirement"}
            ElementTree.SubElement(case, "failure", failure).text = _xml(each.line)
    ElementTree.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="utf-8") + b"\n"


def _xml(text: str) -> str:
    return _NO_XML.sub("�", text)
