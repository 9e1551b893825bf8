"""Search spaces from YAML: what is a distribution, what depends on what, and what is refused with its key."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb.tune import parse_space
from rayemb.tune.space import Distribution

LOSSES = {
    "choice": [
        {"name": "infonce", "temperature": "loguniform(0.01, 0.5)"},
        {"name": "siglip", "bias": -5.0, "memory": {"choice": [{"kind": "queue", "rows": "randint(8, 64)"}, None]}},
    ]
}


def only(text: object) -> Distribution:
    (parameter,) = parse_space({"loss.margin": text}).parameters
    return parameter.distribution


@pytest.mark.parametrize(
    ("text", "kind", "bounds"),
    [
        ("uniform(0, 0.5)", "uniform", (0, 0.5)),
        ("loguniform(0.005, 0.5)", "loguniform", (0.005, 0.5)),
        ("quniform(0, 1, 0.1)", "quniform", (0, 1)),
        ("qloguniform(1e-4, 1, 1e-4)", "qloguniform", (1e-4, 1)),
        ("randint(2, 9)", "randint", (2, 8)),
        ("lograndint(2, 9)", "lograndint", (2, 8)),
        ("randn(0, 0.1)", "randn", None),
    ],
)
def test_a_range_is_read_and_its_draws_lie_within_it(text: str, kind: str, bounds: tuple[float, float] | None) -> None:
    found = only(text)
    assert (found.kind, found.bounds, str(found)) == (kind, bounds, text.replace("1e-4", "0.0001"))
    rng = np.random.default_rng(0)
    values = [found.value(found.domain().sample(random_state=rng)) for _ in range(200)]
    assert len(set(values)) > 5
    if bounds:
        assert bounds[0] <= min(values) <= max(values) <= bounds[1]
    if found.whole:
        assert all(isinstance(value, int) for value in values)
        assert set(values) == set(range(2, 9))
    if found.step:
        assert all(math.isclose(value / found.step, round(value / found.step), abs_tol=1e-6) for value in values)


def test_the_ends_of_a_range_are_what_is_tried_beforehand() -> None:
    assert only("randint(2, 9)").ends == [2, 8]
    assert only("uniform(0, 0.5)").ends == [0, 0.5]
    assert only("randn(1, 0.1)").ends == pytest.approx([0.7, 1.3])
    assert only("choice([1, two, null])").ends == ["1", "two", "null"]


@pytest.mark.parametrize("text", ["choice([1, 'two', None, true])", {"choice": [1, "two", None, True]}])
def test_a_choice_is_read_as_text_or_as_yaml(text: object) -> None:
    assert [option.value for option in only(text).options] == [1, "two", None, True]
    assert len({option.label for option in only(text).options}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform(0, 1", "not a distribution"),
        ("__import__('os').system('true')", "not a distribution"),
        ("gauss(0, 1)", "unknown distribution 'gauss'"),
        ("uniform(0, open('x'))", "plain values"),
        ("uniform(0, 'x')", "finite numbers"),
        ("uniform(0, 1e999)", "finite numbers"),
        ("uniform(1, 0)", "inverted"),
        ("uniform(1, 1)", "empty"),
        ("randint(3, 3)", "empty"),
        ("loguniform(0, 1)", "above 0"),
        ("randint(0.5, 3)", "whole numbers"),
        ("quniform(0, 1, 0)", "step"),
        ("quniform(0, 1, 2)", "step"),
        ("randn(0, 0)", "standard deviation"),
        ("uniform(0)", "takes 2 arguments"),
        ("choice(3)", "takes a list"),
        ("choice([])", "empty"),
        ("choice([1, 2, 1])", "twice"),
        (0.1, "tune.set"),
        ({"choices": [1]}, "choice"),
    ],
)
def test_what_is_no_distribution_is_refused_with_its_key(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"^loss\.margin: ") as caught:
        parse_space({"loss.margin": text})
    assert message in str(caught.value)


def test_an_option_that_is_a_mapping_brings_parameters_that_need_it() -> None:
    space = parse_space({"loss": LOSSES, "steps": "choice([10, 20])"})
    assert [parameter.name for parameter in space.parameters] == [
        "loss",
        "loss[infonce].temperature",
        "loss[siglip].memory",
        "loss[siglip].memory[queue].rows",
        "steps",
    ]
    assert space.conditional
    first = {"loss": "infonce", "loss[infonce].temperature": 0.1, "loss[siglip].memory[queue].rows": 9, "steps": "20"}
    assert space.settings(first) == {"loss.name": "infonce", "loss.temperature": 0.1, "steps": 20}
    second = {"loss": "siglip", "loss[siglip].memory": "queue", "loss[siglip].memory[queue].rows": 9, "steps": "10"}
    assert space.settings(second) == {
        "loss.name": "siglip",
        "loss.bias": -5.0,
        "loss.memory.kind": "queue",
        "loss.memory.rows": 9,
        "steps": 10,
    }
    third = {**second, "loss[siglip].memory": "null"}
    assert space.settings(third) == {"loss.name": "siglip", "loss.bias": -5.0, "loss.memory": None, "steps": 10}


def test_a_conditional_choice_can_be_written_as_text() -> None:
    text = "choice([{name: infonce, temperature: loguniform(0.01, 0.5)}, {name: siglip}])"
    as_yaml = {"choice": [{"name": "infonce", "temperature": "loguniform(0.01, 0.5)"}, {"name": "siglip"}]}
    assert parse_space({"loss": text}) == parse_space({"loss": as_yaml})


def test_a_wrong_range_within_an_option_is_named_with_its_option() -> None:
    with pytest.raises(ValueError, match=r"^loss: loss\[infonce\]\.temperature: .*inverted|^loss\[infonce\]"):
        parse_space({"loss": {"choice": [{"name": "infonce", "temperature": "uniform(1, 0)"}]}})


def test_a_grid_has_inner_choices_only_where_their_option_is() -> None:
    inner = {"name": "siglip", "bias": "choice([-10, -5])"}
    space = parse_space({"loss": {"choice": [{"name": "infonce"}, inner]}, "steps": "grid_search([10, 20])"})
    settings = [space.settings(point) for point in space.points()]
    assert len(settings) == (1 + 2) * 2
    assert {"loss.name": "siglip", "loss.bias": -10, "steps": 20} in settings
    assert [space.settings({"loss": "infonce", **point})["steps"] for point in space.grid()] == [10, 20]


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.integers(0, 2**32 - 1))
def test_any_range_with_a_lower_end_below_the_upper_can_be_drawn_from(low: float, high: float, seed: int) -> None:
    for kind in ("uniform", "loguniform"):
        text = f"{kind}({low!r}, {high!r})"
        if not low < high:
            with pytest.raises(ValueError, match=r"empty|inverted"):
                only(text)
            continue
        found = only(text)
        value = found.value(found.domain().sample(random_state=np.random.default_rng(seed)))
        assert low <= value <= high or math.isclose(value, low, rel_tol=1e-9) or math.isclose(value, high, rel_tol=1e-9)
