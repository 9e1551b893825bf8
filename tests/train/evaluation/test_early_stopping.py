"""The best of a metric, and when it has not come for too long."""

import pytest

from rayemb.train.evaluation import EarlyStopping, EarlyStoppingConfig


def rows(values: list[float | None], metric: str = "val/recall@1") -> list[dict[str, object]]:
    return [{"step": 10 * (n + 1), metric: value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("config", "values", "stop", "best", "step"),
    [
        (EarlyStoppingConfig(patience=2), [0.1, 0.3, 0.2, 0.3], 4, 0.3, 20),
        (EarlyStoppingConfig(patience=3), [0.1, 0.3, 0.2, 0.3, 0.31], None, 0.31, 50),
        (EarlyStoppingConfig(patience=2, min_delta=0.05), [0.1, 0.14, 0.15], 3, 0.1, 10),
        (EarlyStoppingConfig(patience=2, mode="min"), [3.0, 2.0, 2.5, 2.0], 4, 2.0, 20),
        (EarlyStoppingConfig(patience=2), [None, 0.2, None, None], 4, 0.2, 20),
    ],
)
def test_it_ends_after_so_many_without_a_new_best(
    config: EarlyStoppingConfig, values: list[float | None], stop: int | None, best: float, step: int
) -> None:
    stopping, history = EarlyStopping(config), rows(values)
    found = [stopping.update(row) for row in history]
    assert found.index(True) + 1 == stop if stop else not any(found)
    assert stopping.info == {"metric": "val/recall@1", "value": best, "step": step}
    # A resumed run has the history alone, and goes on as if nothing had been.
    resumed = EarlyStopping(config, history[:2])
    assert [resumed.update(row) for row in history[2:]] == found[2:]
    assert resumed.info == stopping.info


def test_steps_that_were_not_evaluated_do_not_count() -> None:
    stopping = EarlyStopping(EarlyStoppingConfig(patience=1))
    assert not any(stopping.update({"step": n, "loss": 1.0}) for n in range(50))
