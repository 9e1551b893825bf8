import pytest

from rayemb.config import ConfigError, load
from rayemb.index import IndexConfig


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF64,Flat", "IVF1024,PQ32", "HNSW32", "OPQ16,IVF64,PQ16x4fs", "PQ7", "SQ8"]
)
def test_factories_of_faiss_are_accepted(factory: str) -> None:
    assert load(IndexConfig, overrides=[f"factory='{factory}'"]).factory == factory


@pytest.mark.parametrize("factory", ["IVF64,Falt", "", "Flat16", "LSH", "IMI2x8,Flat"])
def test_an_unknown_factory_is_an_error_that_names_its_key(factory: str) -> None:
    with pytest.raises(ConfigError, match="FAISS cannot make") as caught:
        load(IndexConfig, overrides=[f"factory='{factory}'"])
    assert [key for key, _ in caught.value.problems] == ["factory"]


@pytest.mark.parametrize(
    "override",
    ["shards=0", "nprobe=0", "rerank=0", "by=x", "prefix=0", "metric=l2", "min_recall=1.1", "nprob=3", "seed=-1"],
)
def test_values_out_of_range_are_errors_that_name_their_key(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(IndexConfig, overrides=[override])
    assert caught.value.problems[0][0] == override.split("=")[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["by=cell", "factory=HNSW32"], "by: cell needs an IVF factory"),
        (["factory=auto", "prefix=8"], "prefix needs a factory of its own"),
    ],
)
def test_settings_that_do_not_fit_together_are_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(IndexConfig, overrides=overrides)


def test_auto_is_a_factory_that_may_be_placed_by_cell() -> None:
    config = load(IndexConfig, overrides=["factory=auto", "by=cell", "plan.recall=0.99", "plan.memory_mb=5"])
    assert (config.factory, config.plan.recall, config.plan.memory_mb) == ("auto", 0.99, 5)
