"""Reports of suites read again, with the items they kept: whether several are of the same suite, data and items."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from rayemb import storage
from rayemb.config import ConfigError, from_mapping
from rayemb.evaluate import kept
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.report import METRICS, Report, read_report
from rayemb.evaluate.suite import SUITE, SuiteConfig
from rayemb.evaluate.tasks import Items

# Where data lie, and what is only shown: their digests and figures say whether the rest is the same.
_APART = {"description", "diagnostics", "data", "file", "corpus", "queries", "qrels", "embeddings", "index"}
_NAMED = 5


@dataclass(frozen=True)
class SuiteReport:
    """A report with the suite that it is of."""

    uri: str
    suite: SuiteConfig
    report: Report

    def system(self, task: str) -> str | None:
        """The model that the report is of; None where it has no figure of the task."""
        part = next((result.directions[0] for result in self.report.results if result.split == task), None)
        return part.systems[0].system if part else None

    def items_uri(self, task: str) -> str:
        """Where the model's items of the task lie."""
        return kept.items_uri(self.uri, task, self.system(task) or "")

    def items(self, task: str) -> Items:
        """The model's items of the task. Raises EvaluateError where they are not there."""
        uri = self.items_uri(task)
        try:
            return kept.read_items(uri)
        except (storage.MissingError, ValueError) as error:
            raise EvaluateError("the items of the task are not there", where=uri, fix="run the suite again") from error


def read_suite(uri: str) -> SuiteReport:
    """The report in a folder. Raises EvaluateError for what is none, or none of a suite."""
    uri = storage.normalise(uri)
    report = read_report(uri)
    source = storage.join(uri, SUITE)
    try:
        suite = from_mapping(SuiteConfig, yaml.safe_load(storage.read_bytes(source)), source=source)
    except storage.MissingError as error:
        raise EvaluateError(
            f"it is no report of a suite: beside {METRICS} there is no {SUITE}",
            where=uri,
            fix="compare what `rayemb evaluate --suite` wrote",
        ) from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        if isinstance(error, storage.StorageError):
            raise
        told = "; ".join(": ".join(each) for each in error.problems) if isinstance(error, ConfigError) else str(error)
        raise EvaluateError(f"it is no suite of this version ({told})", where=source) from error
    return SuiteReport(uri, suite, report)


def check_suite(a: SuiteReport, b: SuiteReport) -> None:
    """Raises EvaluateError naming what differs, where two reports are not of one suite."""
    where = f"{a.uri} and {b.uri}"
    for left, right in ((a, b), (b, a)):
        if alone := [name for name in left.suite.tasks if name not in right.suite.tasks]:
            raise EvaluateError(f"they are of different suites: only {left.uri} has the task {alone[0]!r}", where=where)
    if a.suite.seed != b.suite.seed:
        told = f"{a.suite.seed} and {b.suite.seed}"
        raise EvaluateError(f"their suites drew by different seeds ({told})", where=where, fix="give them one seed")
    for name in a.suite.tasks:
        ours, theirs = (dict(_settings(each.suite.tasks[name].model_dump(mode="json"))) for each in (a, b))
        if differ := [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]:
            key = differ[0]
            raise EvaluateError(
                f"they are of different suites: tasks.{name}.{key} is {ours.get(key)!r} and {theirs.get(key)!r}",
                where=where,
            )


def _settings(document: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value of all that figures depend on but the data, which have a digest."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{path}{key}.")
        elif key not in _APART:
            yield path + key, value


def same_items(task: str, read: Sequence[tuple[SuiteReport, SuiteReport]]) -> tuple[list[Items], list[Items]]:
    """The items of A's reports and of B's, all in the order of the first.

    Raises EvaluateError naming ids that not all have, and data that differ.
    """
    first, where = read[0][0], f"task {task!r}"
    items = first.items(task)
    data = kept.data_digest(first.items_uri(task))
    sides: tuple[list[Items], list[Items]] = ([], [])
    for pair in read:
        for side, report in zip(sides, pair, strict=True):
            other = report.items(task)
            missing = [_some(set(x.ids) - set(y.ids)) for x, y in ((items, other), (other, items))]
            if any(missing) or len(items.ids) != len(other.ids):
                told = [f"only {r.uri} has {ids}" for r, ids in zip((first, report), missing, strict=True) if ids]
                told = told or [f"{len(items.ids):,} and {len(other.ids):,} of them"]
                raise EvaluateError(f"the reports are of different items: {'; '.join(told)}", where=where)
            theirs = kept.data_digest(report.items_uri(task))
            if data and theirs and data != theirs:
                raise EvaluateError(
                    f"the data differ between {first.uri} ({data[:12]}) and {report.uri} ({theirs[:12]})", where=where
                )
            side.append(_in_order(other, items.ids))
    return sides


def _some(ids: set[str]) -> str:
    shown = sorted(ids)[:_NAMED]
    return ", ".join(map(repr, shown)) + (f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else "")


def _in_order(items: Items, ids: list[str]) -> Items:
    if items.ids == ids:
        return items
    at = {each: row for row, each in enumerate(items.ids)}
    rows = np.array([at[each] for each in ids])
    clusters = None if items.clusters is None else items.clusters[rows]
    return Items(ids, {name: column[rows] for name, column in items.columns.items()}, clusters)
