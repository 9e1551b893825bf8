"""What all losses share: the batch, its errors, the mean, configs by name; and what every loss must satisfy."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from pydantic import Field
from torch import Tensor

from rayemb.config import Config, ConfigError, dump, from_mapping, load, schema
from rayemb.losses import AnyLoss, Batch, InfoNCE, InfoNCEConfig, Loss, Rows
from rayemb.losses.base import scaled, share_of_mean, unit
from rayemb.parallel import NO_KEY, Alone, ExchangeError
from tests.losses.common import EVERY, built, changed, everything, exact, gradients, vectors


class Run(Config):
    loss: AnyLoss = Field(default_factory=InfoNCEConfig)


# -- the batch -------------------------------------------------------------------------------------------------

Q, D, N = vectors(3), vectors(3, seed=1), vectors(2, seed=2)


def spoiled(row: int, value: float) -> Tensor:
    rows = vectors(3)
    rows[row] = 0 if value == 0 else rows[row]
    rows[row, 1] = value
    return rows


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (Batch(spoiled(1, math.nan), D), "queries row 1 is not finite"),
        (Batch(Q, spoiled(2, math.inf)), "documents row 2 is not finite"),
        (Batch(Q, D, negatives=spoiled(0, -math.inf)), "negatives row 0 is not finite"),
        (Batch(Q, spoiled(1, 0.0)), "documents row 1 is a zero vector"),
        (Batch(Q, D, memory=spoiled(2, 0.0)), "memory row 2 is a zero vector"),
        (Batch(Q, D[:, :5]), "documents have 5 dimensions, queries 6"),
        (Batch(Q, D, negatives=N[:, :2]), "negatives have 2 dimensions, queries 6"),
        (Batch(Q[0], D), r"queries are torch.float64 of shape (6,), not floating-point (n, D)"),
        (Batch(Q, D.long()), r"documents are torch.int64 of shape (3, 6), not floating-point (n, D)"),
        (Batch(Q, D[:2]), "documents has 2 rows, not 3"),
        (Batch(Q, D, keys=torch.arange(2)), "keys has 2 rows, not 3"),
        (Batch(Q, D, tasks=torch.arange(4)), "tasks has 4 rows, not 3"),
        (Batch(Q, D, labels=torch.arange(4)), "labels has 4 rows, not 3"),
        (Batch(Q, D, negatives=N, negative_rows=torch.arange(3)), "negative_rows has 3 rows, not 2"),
        (Batch(Q, D, negatives=N, negative_rows=torch.tensor([0, 3])), "negative_rows points outside the 3 queries"),
        (Batch(Q, D, negatives=N, negative_rows=torch.tensor([0, -1])), "negative_rows points outside the 3 queries"),
        (Batch(Q, D, negative_keys=torch.arange(1)), "negative_keys has 1 rows, not 0"),
        (Batch(Q, D, memory=N, memory_keys=torch.arange(1)), "memory_keys has 1 rows, not 2"),
        (Batch(Q, D, weights=torch.ones(2, 3)), "weights has 2 rows, not 3"),
        (Batch(Q, D, negatives=N, weights=torch.ones(3, 3)), "weights has shape (3, 3), not (3, 5)"),
        (
            Batch(Q, D, keys=torch.ones(3, 2).long(), negatives=N, negative_keys=torch.arange(2)),
            "negative_keys has shape (2,), keys (3, 2)",
        ),
        (Batch(Q, D, guide=Batch(Q, spoiled(1, 0.0))), "the guide's documents row 1 is a zero vector"),
        (everything(3), None),
        (everything(0), None),
    ],
)
def test_an_unusable_batch_names_argument_and_row(batch: Batch, problem: str | None) -> None:
    assert batch.problem() == problem
    if problem is not None:
        with pytest.raises(ExchangeError) as error:
            exact({})(batch)
        assert (error.value.where, error.value.what) == ("the batch", problem)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("supcon", "class_proxies")])
def test_documents_are_needed(name: str) -> None:
    with pytest.raises(ExchangeError, match=r"(?i)needs documents"):
        exact(EVERY[name])(replace(everything(3), documents=None, negatives=None, negative_rows=None, guide=None))


def test_weights_that_make_no_sense() -> None:
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ExchangeError, match=r"pairs.weights has a negative or non-finite weight"):
            exact({})(Batch(Q, D, weights=torch.eye(3) * bad))


def test_candidates_are_unit_vectors_of_all_parts_with_their_keys() -> None:
    batch = Batch(Q, D, negatives=N, keys=torch.tensor([4, 5, 6]), memory=vectors(1), memory_keys=torch.tensor([7]))
    torch.testing.assert_close(
        batch.candidates(), torch.cat([x / x.norm(dim=1, keepdim=True) for x in (D, N, vectors(1))])
    )
    keys = batch.candidate_keys()
    assert keys is not None
    assert keys.tolist() == [4, 5, 6, NO_KEY, NO_KEY, 7]
    assert replace(batch, keys=None).candidate_keys() is None
    two = replace(batch, keys=torch.ones(3, 2).long(), negative_keys=torch.zeros(2, 2).long(), memory_keys=None)
    keys = two.candidate_keys()
    assert keys is not None
    assert keys.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2 + [[NO_KEY, NO_KEY]]


def test_views_are_both_sides_of_each_pair() -> None:
    views = Batch(Q, D, negatives=N, keys=torch.tensor([4, 5, 6]), weights=torch.eye(3, 5)).views()
    assert torch.equal(views.queries, torch.cat([Q, D]))
    assert views.documents is not None
    assert torch.equal(views.documents, views.queries)
    assert views.keys is not None
    assert views.keys.tolist() == [4, 5, 6, 4, 5, 6]
    assert views.negatives is N
    assert views.weights is None
    alone = Batch(Q, keys=torch.arange(3)).views()
    assert alone.queries is Q
    assert alone.documents is Q


def test_a_prefix_cuts_vectors_but_not_the_guides() -> None:
    batch = Batch(Q, D, negatives=N, memory=Q, guide=Batch(Q, D), keys=torch.arange(3), progress=0.5)
    cut = batch.prefix(2)
    for name in ("queries", "documents", "negatives", "memory"):
        assert torch.equal(getattr(cut, name), getattr(batch, name)[:, :2])
    assert (cut.guide, cut.keys, cut.progress) == (batch.guide, batch.keys, 0.5)
    assert Batch(Q).prefix(2).documents is None


@pytest.mark.parametrize("name", ["infonce", "siglip", "decoupled", "debiased", "focal"])
@pytest.mark.parametrize("with_memory", [False, True])
def test_sparse_weights_are_dense_ones(name: str, with_memory: bool) -> None:
    weights = torch.tensor([[1.0, 0, 0.5, 0, 0], [0, 0, 0, 0, 0], [0, 0.2, 1, 0.7, 0]])
    batch = Batch(Q, D, negatives=N, weights=weights, memory=vectors(4, seed=9) if with_memory else None)
    loss = exact(EVERY[name])
    dense, sparse = gradients(loss, batch), gradients(loss, replace(batch, weights=weights.to_sparse()))
    assert loss(batch).item() == loss(replace(batch, weights=weights.to_sparse())).item()
    assert all(torch.equal(dense[key], sparse[key]) for key in dense)


def test_identity_weights_are_no_weights_and_the_memory_has_none() -> None:
    memory = vectors(4, seed=9)
    batch = Batch(Q, D, negatives=N, memory=memory)
    loss = exact({"directions": ["query_to_document"]})
    as_negatives = Batch(Q, D, negatives=torch.cat([N, memory]))
    torch.testing.assert_close(loss(batch), loss(as_negatives), rtol=1e-14, atol=0)
    torch.testing.assert_close(loss(replace(batch, weights=torch.eye(3, 5))), loss(batch), rtol=1e-14, atol=0)


# -- the mean --------------------------------------------------------------------------------------------------


class OneOfThree(Alone):
    """A rank of three; the others have 6 counted rows."""

    world = 3

    def reduce(self, values: Tensor, op: Any = "sum") -> Tensor:
        return values + 6


def test_a_share_is_of_the_mean_over_all_ranks() -> None:
    rows = Rows(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert share_of_mean(rows, Alone()).item() == 5
    assert share_of_mean(rows, OneOfThree()).item() == 10 * 3 / 8  # averaged over 3 ranks: 10 / 8 from this one
    nothing = Rows(torch.zeros(2), torch.zeros(2))
    assert share_of_mean(nothing, Alone()).item() == 0


def test_unit_and_scaled_rows() -> None:
    rows = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    assert unit(rows).flatten().tolist() == pytest.approx([0.6, 0.8] * 2)
    # 300 ** 2 overflows fp16.
    assert unit(rows.half()).dtype == torch.float16
    assert unit(rows.half())[1].tolist() == pytest.approx([0.6, 0.8], abs=1e-3)
    assert scaled(rows, torch.tensor([2.0])).tolist() == [[6, 8], [600, 800]]
    assert scaled(rows, torch.tensor([2.0, 0.5])).tolist() == [[6, 8], [150, 200]]
    assert scaled(rows.bfloat16(), torch.tensor([2.0])).dtype == torch.float32


# -- what every loss satisfies ---------------------------------------------------------------------------------


def test_every_loss_of_the_union_is_here() -> None:
    named = Run.model_json_schema()["properties"]["loss"]["discriminator"]["mapping"]
    assert {built(config).config.name for config in EVERY.values()} == set(named)


def of(loss: Loss, batch: Batch) -> float:
    """The value, without remembering."""
    value: float = copy.deepcopy(loss)(batch).item()
    return value


@pytest.fixture(params=EVERY)
def loss(request: pytest.FixtureRequest) -> Loss:
    """Each loss in turn, fp64; its memory, if any, not empty."""
    made = exact(EVERY[request.param])
    if request.param == "cross_batch_memory":
        made(everything(3, seed=50))
    return made


def test_gradients_equal_finite_differences(loss: Loss) -> None:
    batch = everything(4)
    names = [name for name, p in loss.named_parameters() if p.requires_grad]

    def run(q: Tensor, d: Tensor, n: Tensor, *parameters: Tensor) -> Any:
        given = replace(batch, queries=q, documents=d, negatives=n)
        return torch.func.functional_call(
            copy.deepcopy(loss), dict(zip(names, parameters, strict=True)), (given,), strict=False
        )

    leaves = [batch.queries, batch.documents, batch.negatives, *(loss.get_parameter(name) for name in names)]
    assert torch.autograd.gradcheck(
        run, tuple(x.detach().clone().requires_grad_() for x in leaves if x is not None), fast_mode=True
    )


def test_lengths_do_not_matter(loss: Loss) -> None:
    batch = everything(5)
    assert batch.documents is not None
    assert batch.negatives is not None
    assert batch.guide is not None
    stretched = replace(
        batch,
        queries=batch.queries * torch.arange(1, 6)[:, None],
        documents=batch.documents * 0.1,
        negatives=batch.negatives * 30,
        guide=replace(batch.guide, queries=batch.guide.queries * 7),
    )
    assert of(loss, stretched) == pytest.approx(of(loss, batch), rel=1e-10)


def test_the_order_of_rows_does_not_matter(loss: Loss) -> None:
    batch, order = everything(5), torch.tensor([3, 0, 4, 2, 1])
    assert batch.negative_rows is not None
    assert batch.guide is not None
    names = ("queries", "documents", "keys", "labels", "tasks")
    shuffled = replace(
        batch,
        **{name: getattr(batch, name)[order] for name in names},
        negative_rows=order.argsort()[batch.negative_rows],
        guide=replace(batch.guide, **{name: getattr(batch.guide, name)[order] for name in names[:2]}),
        exits={
            n: replace(small, **{name: getattr(small, name)[order] for name in names[:3]})
            for n, small in batch.exits.items()
        },
    )
    assert of(loss, shuffled) == pytest.approx(of(loss, batch), rel=1e-10)


def test_no_rows_give_no_loss_and_no_gradient(loss: Loss) -> None:
    for batch in (everything(0), replace(everything(0), negatives=None, negative_rows=None)):
        if batch.negatives is None and batch.guide is not None:
            batch = replace(batch, guide=replace(batch.guide, negatives=None))
        assert of(loss, batch) == 0
        assert not any(gradient.any() for gradient in gradients(loss, batch).values())


def test_one_row_without_negatives(loss: Loss) -> None:
    made, batch = exact(loss.config.model_dump()), everything(1, negatives=0)
    assert all(gradient.isfinite().all() for gradient in gradients(made, batch).values())
    value = of(exact(loss.config.model_dump()), batch)
    if isinstance(loss, InfoNCE) and loss.config.partition == "joint":
        assert value == pytest.approx(math.log(2))  # the positive is in the denominator twice
    elif loss.config.name in ("siglip", "class_proxies"):
        assert value > 0
    else:
        assert value == 0


def test_a_batch_of_duplicates_is_finite(loss: Loss) -> None:
    batch = everything(4, negatives=0)
    found = gradients(loss, replace(batch, keys=torch.zeros(4, dtype=torch.int64)))
    assert all(gradient.isfinite().all() for gradient in found.values())
    same = vectors(1).expand(4, 6)
    found = gradients(loss, replace(batch, queries=same, documents=same))
    assert all(gradient.isfinite().all() for gradient in found.values())


def at(temperature: float, config: dict[str, Any]) -> dict[str, Any]:
    if "loss" in config:
        return {**config, "loss": at(temperature, config["loss"])}
    return {**config, "temperature": temperature, "learnable_temperature": False}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("temperature", [1e-4, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_temperatures_stay_finite_in_fp32(name: str, temperature: float, sign: int) -> None:
    batch = everything(32, dtype=torch.float32)
    batch = replace(batch, documents=sign * batch.queries)
    made = built(at(temperature, EVERY[name]))
    assert math.isfinite(of(made, batch))
    assert all(gradient.isfinite().all() for gradient in gradients(made, batch).values())


@pytest.mark.parametrize("name", EVERY)
def test_fp32_is_close_to_fp64(name: str) -> None:
    made, batch = built(EVERY[name]), everything(16, dtype=torch.float32)
    wide = changed(batch, Tensor.double)
    value, expected = copy.deepcopy(made)(batch), of(copy.deepcopy(made).double(), wide)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)
    reference = gradients(copy.deepcopy(made).double(), wide)
    for key, gradient in gradients(made, batch).items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), reference[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_vectors_give_an_fp32_loss(name: str, dtype: torch.dtype) -> None:
    # Coordinates of +-1 in 64 dimensions: unit vectors without rounding, so that only the arithmetic is compared.
    made, batch = built(EVERY[name], 64), everything(16, dim=64)
    signs = changed(batch, Tensor.sign)
    narrow = changed(signs, lambda rows: rows.to(dtype))
    value, expected = copy.deepcopy(made)(narrow), of(copy.deepcopy(made).double(), signs)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=2e-2 if name in ("matryoshka", "starbucks") else 1e-5)
    for part, gradient in gradients(made, narrow).items():
        assert gradient.dtype == (dtype if part in ("queries", "documents", "negatives") else torch.float32)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_nothing(name: str) -> None:
    made, batch = built(EVERY[name]), everything(16, dtype=torch.float32)
    expected = of(made, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert of(made, batch) == expected


def test_sides_of_different_dtypes_meet_in_fp32() -> None:
    for a, b in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        value = built({})(Batch(vectors(3, dtype=a), vectors(3, seed=1, dtype=b)))
        assert value.dtype == torch.float32


# -- configs by name -------------------------------------------------------------------------------------------


def test_a_block_without_a_name_is_infonce() -> None:
    for block in ({}, {"temperature": 0.1}, {"margin": 0.2, "directions": ["query_to_document"]}):
        assert from_mapping(Run, {"loss": block}).loss == InfoNCEConfig(**block)
    assert Run().loss == InfoNCEConfig()
    inside = from_mapping(Run, {"loss": {"name": "focal", "loss": {"temperature": 0.1}}}).loss
    assert inside.loss == InfoNCEConfig(temperature=0.1)  # type: ignore[union-attr]


def test_a_config_says_what_its_batches_need() -> None:
    needs = {name: from_mapping(Run, {"loss": block}).loss.needs for name, block in EVERY.items()}
    needed = {name: set(fields) for name, fields in needs.items() if fields}
    assert needed == {
        "gist_embed": {"guide"},
        "class_proxies": {"labels"},
        "rzenembed": {"tasks"},
        "starbucks": {"exits"},
    }
    wrapped = from_mapping(Run, {"loss": inside(EVERY["gist_embed"], FOCAL, MATRYOSHKA)})
    assert wrapped.loss.needs == {"guide"}
    assert not from_mapping(Run, {"loss": {"name": "rzenembed", "tasks": 1}}).loss.needs
    for name in ("gist_embed", "class_proxies"):
        (field,) = needed[name]
        with pytest.raises(ExchangeError, match=f"needs .*{field}"):
            exact(EVERY[name])(replace(everything(3), **{field: None}))


@pytest.mark.parametrize("name", EVERY)
def test_a_config_comes_back_from_its_yaml(name: str, tmp_path: Any) -> None:
    run = from_mapping(Run, {"loss": EVERY[name]})
    (tmp_path / "run.yaml").write_text(dump(run))
    assert load(Run, tmp_path / "run.yaml") == run
    jsonschema.validate(json.loads(run.model_dump_json()), json.loads(schema(Run)))


def test_wrappers_nest() -> None:
    inner: dict[str, Any] = {"temperature": 0.2}
    nested = {"name": "matryoshka", "dims": [2, 6], "loss": {"name": "focal", "gamma": 2, "loss": inner}}
    batch = Batch(vectors(5), vectors(5, seed=1))
    total = 0.0
    for dim in (2, 6):
        q, d = (torch.nn.functional.normalize(x[:, :dim], dim=1) for x in (batch.queries, vectors(5, seed=1)))
        for s in (q @ d.T / 0.2, d @ q.T / 0.2):
            p = s.softmax(1).diagonal()
            total += ((1 - p) ** 2 * -p.log()).mean().item() / 2
    made = exact(nested)
    assert made(batch).item() == pytest.approx(total, rel=1e-10)
    assert made.temperature == pytest.approx(0.2)
    whole = {"name": "progressive", "width": 1e6, "noise_above": 1, "loss": nested}
    remembered = exact({"name": "cross_batch_memory", "loss": whole})
    assert remembered(batch).item() == pytest.approx(total, rel=1e-9)
    assert [name for name, _ in remembered.named_parameters()] == ["loss.loss.loss.loss.scale.log_scale"]


def inside(config: dict[str, Any], *wrappers: dict[str, Any]) -> dict[str, Any]:
    for wrapper in wrappers:
        config = {**wrapper, "loss": config}
    return config


FOCAL, MATRYOSHKA = {"name": "focal"}, {"name": "matryoshka", "dims": [2]}
PROGRESSIVE, MEMORY = {"name": "progressive"}, {"name": "cross_batch_memory"}
PROXIES, GIST = {"name": "class_proxies", "classes": 3}, {"name": "gist_embed"}


@pytest.mark.parametrize("between", [(), (FOCAL,), (FOCAL, PROGRESSIVE)])
@pytest.mark.parametrize(
    ("config", "wrapper", "message"),
    [
        (PROXIES, MATRYOSHKA, "class_proxies knows whole vectors only: it cannot be inside matryoshka"),
        (inside({}, MEMORY), MATRYOSHKA, "cross_batch_memory knows whole vectors only"),
        (inside({}, MATRYOSHKA), MATRYOSHKA, "one list of dims is enough"),
        (PROXIES, MEMORY, "class_proxies has no use for remembered documents"),
        (GIST, MEMORY, "gist_embed has no use for remembered documents"),
        (inside({}, MEMORY), MEMORY, "cross_batch_memory has no use for remembered documents"),
        ({"name": "decoupled"}, FOCAL, "exp(-L) is no probability"),
    ],
)
def test_nestings_that_cannot_work_are_refused_at_any_depth(
    config: dict[str, Any], wrapper: dict[str, Any], message: str, between: tuple[dict[str, Any], ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(Run, {"loss": inside(config, *between, wrapper)})
    assert any(message in found for _, found in error.value.problems)


@pytest.mark.parametrize(
    ("block", "key", "message"),
    [
        ({"temprature": 0.1}, "loss.temprature", "did you mean 'temperature'?"),
        ({"name": "infonse"}, "loss", "'infonce', 'siglip', 'nt_xent'"),
        ({"name": "siglip", "directions": []}, "loss.directions", "unknown key"),
        ({"name": "siglip", "temperature": "warm"}, "loss.temperature", "valid number"),
        ({"name": "debiased", "positive_rate": 1.0}, "loss.positive_rate", "less than 1 (got 1.0)"),
        ({"name": "rzenembed", "tasks": 0}, "loss.tasks", "greater than or equal to 1 (got 0)"),
        ({"name": "gist_embed", "margin_strategy": "both"}, "loss.margin_strategy", "'absolute' or"),
        ({"name": "focal"}, "loss.loss", "Field required"),
        ({"name": "progressive", "loss": {}, "width": 0}, "loss.width", "greater than 0 (got 0)"),
        ({"name": "focal", "loss": {"margn": 1}}, "loss.loss.margn", "did you mean 'margin'?"),
        ("infonce", "loss", "valid dictionary"),
        (None, "loss", "valid dictionary"),
        ({"temperature": math.inf}, "loss.temperature", "finite number"),
    ],
)
def test_an_error_in_yaml_names_its_key(block: Any, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(Run, {"loss": block})
    assert error.value.problems[0][0] == key
    assert message in error.value.problems[0][1]


def test_the_json_schema_tells_named_blocks_apart() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema(Run)))
    for config in EVERY.values():
        block = json.loads(json.dumps({"name": "infonce", **config}))
        if "loss" in block:
            block["loss"] = {"name": "infonce", **block["loss"]}
        assert validator.is_valid({"loss": block})
    for wrong in (
        {"name": "nope"},
        {"name": "siglip", "directions": []},
        {"name": "focal"},
        {"name": "infonce", "x": 1},
    ):
        assert not validator.is_valid({"loss": wrong})
