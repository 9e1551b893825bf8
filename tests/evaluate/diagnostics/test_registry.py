"""Every diagnostic runs by name on what it needs, and says what it lacks."""

import math
from typing import NamedTuple

import numpy as np
import pytest

from rayemb.evaluate.diagnostics import DIAGNOSTICS, Inputs, possible
from rayemb.evaluate.diagnostics.registry import entry, registry
from rayemb.evaluate.metrics import MetricError
from tests.imports import loaded


def everything(rows: int = 120, dim: int = 12) -> Inputs:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, rows)
    x = (rng.normal(size=(rows, dim)) + 2 * rng.normal(size=(4, dim))[labels]).astype(np.float32)
    return Inputs(
        vectors=x,
        labels=labels,
        pairs=(x + 0.3 * rng.normal(size=x.shape)).astype(np.float32),
        texts=tuple("word " * int(n) for n in rng.integers(1, 60, rows)),
        views=(x[:, None] + 0.3 * rng.normal(size=(rows, 5, dim))).astype(np.float32),
        train=(x[rng.permutation(rows)] + 0.3 * rng.normal(size=x.shape)).astype(np.float32),
        other=(x @ rng.normal(size=(dim, 9))).astype(np.float32),
        graph=np.stack([np.arange(rows), (np.arange(rows) + 1) % rows], axis=1),
    )


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_each_runs_by_name_and_its_main_figure_has_that_name(name: str) -> None:
    figures = DIAGNOSTICS[name].run(everything())
    assert next(iter(figures)) == name
    assert all(type(value) is float and math.isfinite(value) for value in figures.values())
    assert all(key == name or key.startswith(f"{name}_") for key in figures)


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_each_names_what_it_lacks_and_runs_on_no_more_than_it_asks_for(name: str) -> None:
    diagnostic, all_of = DIAGNOSTICS[name], everything()
    with pytest.raises(MetricError, match=f"{name}: needs {', '.join(sorted(diagnostic.needs))}"):
        diagnostic.run(Inputs())
    least = Inputs(**{need: getattr(all_of, need) for need in diagnostic.needs})
    assert diagnostic.run(least) == diagnostic.run(all_of)


def test_what_is_possible_follows_from_what_is_there() -> None:
    assert possible(Inputs()) == []
    assert possible(everything()) == list(DIAGNOSTICS)
    found = possible(Inputs(vectors=np.eye(3)))
    assert "rankme" in found
    assert "tolerance" not in found


def test_vectors_of_any_length_are_looked_at_by_direction_where_the_method_means_that() -> None:
    x = everything().vectors
    assert x is not None
    one, ten = (DIAGNOSTICS["uniformity"].run(Inputs(vectors=v))["uniformity"] for v in (x, 10 * x))
    assert one == pytest.approx(ten, rel=1e-6)
    x[7] = 0
    with pytest.raises(MetricError, match=r"vectors: 1 of 120 vectors are zero \(first: row 7\)"):
        DIAGNOSTICS["uniformity"].run(Inputs(vectors=x))


class Two(NamedTuple):
    main: float
    extra: float
    curve: tuple[float, ...] = ()


def test_a_registry_keeps_numbers_and_refuses_the_rest() -> None:
    found = registry(entry("two", "vectors", lambda i: Two(1, 2), "higher", "here"))
    inputs = Inputs(vectors=np.eye(2))
    assert found["two"].run(inputs) == {"two": 1.0, "two_extra": 2.0}
    broken = entry("broken", "vectors", lambda i: Two(1, math.inf), "higher", "here")
    with pytest.raises(MetricError, match="broken: there is no finite figure for broken_extra"):
        broken.run(inputs)
    with pytest.raises(MetricError, match="broken: is there twice"):
        registry(broken, broken)
    with pytest.raises(MetricError, match=r"no such inputs: \['vectros'\]"):
        registry(entry("typo", "vectros", lambda i: 1.0, "higher", "here"))


def test_the_package_loads_nothing_heavy() -> None:
    # Every worker of a training imports it.
    assert loaded("import rayemb.evaluate.diagnostics", ["sklearn", "scipy.stats"]) == []
