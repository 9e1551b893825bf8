"""Micro-batches of pairs, and the objective as the engine sees it."""

import pytest
import torch

from rayemb.errors import RayembError
from rayemb.losses import InfoNCEConfig, StarbucksConfig
from rayemb.models import ConvNetConfig, TextTransformerConfig, TwoTower, TwoTowerConfig
from rayemb.parallel import Alone, gradient_cache
from rayemb.train.objective import Objective, micro_batches, trimmed

MODEL = TwoTowerConfig(
    dim=16,
    image=ConvNetConfig(image_size=16, widths=(8, 16), depths=(1, 1)),
    text=TextTransformerConfig(width=16, depth=1, heads=2),
)
LENGTHS = torch.tensor([3, 9, 1, 5, 9, 2, 4, 7])


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (8, 12), generator=generator)
    tokens[torch.arange(12)[None] >= LENGTHS[:, None]] = -1
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {"pixels": pixels, "tokens": tokens, "keys": torch.arange(8)}


def objective() -> Objective:
    torch.manual_seed(0)
    return Objective(TwoTower(MODEL, 50), InfoNCEConfig(temperature=0.1).build(16)).double()


def test_each_micro_batch_is_as_wide_as_its_longest_text() -> None:
    parts, whole = micro_batches(batch(), rows=None, tokens=20)
    assert all(part["tokens"].numel() <= 20 for part in parts)
    assert [part["tokens"].shape[1] for part in parts] == [int((part["tokens"] != -1).sum(1).max()) for part in parts]
    assert torch.equal(torch.cat([part["keys"] for part in parts]), whole["keys"])
    assert sorted(whole["keys"].tolist()) == list(range(8))
    for part in parts:
        for ids, key in zip(part["tokens"], part["keys"], strict=True):
            assert torch.equal(ids[ids != -1], batch()["tokens"][key][: LENGTHS[key]])


def test_no_text_at_all_keeps_one_column() -> None:
    assert trimmed(torch.full((2, 5), -1)).shape == (2, 1)
    assert trimmed(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 1)


def test_micro_batches_of_real_towers_have_the_gradient_of_the_whole_batch() -> None:
    gradients = []
    for rows, tokens in ((None, None), (3, None), (None, 20)):
        module = objective()
        parts, whole = micro_batches(batch(), rows=rows, tokens=tokens)
        value = gradient_cache(
            module,
            parts,
            lambda encoded, module=module, whole=whole: module.share(encoded, whole, Alone()),
            lambda scalar, last: scalar.backward(),
        )
        gradients.append((value, {name: p.grad for name, p in module.named_parameters()}))
    (expected, whole_gradients), *others = gradients
    for value, found in others:
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        for name, gradient in whole_gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def starbucks(*sizes: tuple[int, int], depth: int = 3) -> Objective:
    torch.manual_seed(0)
    text = MODEL.text.model_copy(update={"depth": depth})
    loss = StarbucksConfig(sizes=sizes, loss=InfoNCEConfig(temperature=0.1)).build(16)
    return Objective(TwoTower(MODEL.model_copy(update={"image": None, "text": text}), 50), loss).double()


def texts() -> dict[str, torch.Tensor]:
    tokens = batch()["tokens"]
    more = {"negative_tokens": tokens[:4].flip(0), "negative_counts": torch.tensor([2, 0, 0, 1, 0, 0, 1, 0])}
    return {"query_tokens": tokens.flip(0), "tokens": tokens, "keys": torch.arange(8), **more}


def test_sizes_have_the_gradient_of_the_whole_batch_in_micro_batches() -> None:
    gradients = []
    for rows in (None, 3):
        module = starbucks((1, 4), (2, 8), (3, 16))
        parts, whole = micro_batches(texts(), rows=rows, tokens=None)
        value = gradient_cache(
            module,
            parts,
            lambda encoded, module=module, whole=whole: module.share(encoded, whole, Alone()),
            lambda scalar, last: scalar.backward(),
        )
        gradients.append((value, {name: p.grad for name, p in module.named_parameters()}))
    (expected, wanted), (value, found) = gradients
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_a_size_is_what_the_model_is_when_it_is_cut_to_it() -> None:
    module, mine = starbucks((1, 4), (3, 16)), texts()
    rows = module(mine).rows
    assert sorted(rows) == ["documents", "documents@1", "negatives", "negatives@1", "queries", "queries@1"]
    assert sorted(module.eval()(mine).rows) == ["documents", "negatives", "queries"]
    small = starbucks((1, 4), (3, 16)).network.text
    small.blocks = small.blocks[:1]
    module.network.text = small
    torch.testing.assert_close(rows["documents@1"], module.network.encode_text(mine["tokens"]))
    # Layers above a size have no gradient from it, nor have coordinates beyond it.
    module = starbucks((1, 4), (3, 16)).train()
    module(mine).rows["documents@1"][:, :4].sum().backward()
    assert all(p.grad is None for block in module.network.text.blocks[1:] for p in block.parameters())
    assert all(p.grad is not None for p in module.network.text.blocks[0].parameters())


def test_sizes_of_another_depth_are_refused() -> None:
    with pytest.raises(RayembError, match="the last size has 3 layers and the text tower 2") as caught:
        starbucks((1, 4), (3, 16), depth=2)
    assert caught.value.where == "train.loss.sizes"
