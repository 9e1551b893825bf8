"""A training config that cannot work is refused before anything starts; how the work is cut up is not its outcome."""

import pytest

from rayemb.config import ConfigError, load
from rayemb.train import TrainConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=1"], "less than a row for each of 2 workers"),
        (["min_workers=3"], r"min_workers \(3\) is more than workers \(2\)"),
        (["zero_stage=0", "precision=bf16"], "zero_stage >= 1"),
        (["zero_stage=0", "offload_optimizer=true"], "offload_optimizer needs zero_stage >= 1"),
        (["zero_stage=2", "offload_parameters=true"], "offload_parameters needs zero_stage 3"),
        (["zero_stage=0", "precision=fp16"], "fp16 needs zero_stage >= 1"),
        (["optimizer.name=lamb"], "lamb needs zero_stage 0: it looks at whole matrices"),
        (["optimizer={name: lion}"], "'adamw', 'lamb', 'lars', 'muon'"),
        (["loss.name=gist_embed"], r"gist_embed needs \['guide'\]"),
        (["corpora={a: {}, b: {weight: 2}}"], "a has no weight"),
        (["corpora={a: {}, b: {loss: {name: siglip}}}", "mix.batches=mixed"], "rows of several corpora"),
        (["corpora.b.loss.name=gist_embed"], r"b\.loss: gist_embed needs \['guide'\]"),
        (["corpora={a: {}, b: {sampler: {name: length_bucketed}}}", "mix.batches=mixed"], "makes whole batches"),
        (["corpora={a: {}, b: {}, c: {}}", "loss={name: rzenembed, tasks: 2}"], "2 tasks and there are 3"),
        (["corpora.main.sampler={name: class_balanced, per_class: 3}"], r"batch_size \(256\) must be a multiple"),
        (["corpora.main.sampler={name: class_balanced}", "mix.distinct=[concept]"], "concept is what corpora"),
        (["corpora.main.sampler={name: cluster_stratified}"], "no column 'cluster' to sample by"),
        (["corpora={}"], "at least 1 item"),
        (["corpora.main.uri=ftp://x/y"], "unknown scheme"),
        (["model.dim=64", "loss={name: matryoshka, dims: [32, 128], loss: {}}"], "dims has 128, the vectors have 64"),
        (["tile=[0, 4]"], "greater than or equal to 1"),
        (["exchange=telepathy"], "'gather' or 'ring'"),
        (["early_stopping={metric: test/recall@1}"], "'test/recall@1' is not measured; there are val/recall@1, val/"),
        (["evaluation.tasks.x={kind: knn, corpus: b}"], r"x\.corpus: 'b' is none of corpora \(main\)"),
        (["evaluation.tasks.x={kind: knn, kk: 3}"], r"evaluation\.tasks\.x\.kk: unknown key. did you mean 'k'"),
        (["evaluation.tasks.x={kind: zero_shot, templates: [a]}"], "'a' needs one {} for the name"),
        (["logging.sinks=[{name: mlflo}]"], "'tensorboard', 'mlflow', 'wandb'"),
        (["micro_batch_size=0"], "greater than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, None, overrides)


def test_any_loss_is_chosen_by_name() -> None:
    config = load(TrainConfig, None, ["loss={name: cross_batch_memory, size: 10, loss: {name: siglip, bias: -5}}"])
    assert config.loss.build(config.model.dim).loss.bias.item() == -5
    assert load(TrainConfig, None, ["loss.temperature=0.2"]).loss.name == "infonce"


def test_cutting_the_work_up_differently_does_not_start_a_run_anew() -> None:
    whole = load(TrainConfig)
    how = ["micro_batch_size=8", "exchange=ring", "tile=[4, 4]", "logging.every=1", "workers=3"]
    cut = load(TrainConfig, None, how)
    assert cut.outcome == whole.outcome
    for other in ("steps=1", "seed=3", "loss.temperature=0.2", "zero_stage=3"):
        assert load(TrainConfig, None, [other]).outcome != whole.outcome
