"""A small run of the whole line, made once and looked at by several tests."""

from pathlib import Path

import pytest

from rayemb.config import load
from rayemb.pipeline import RunConfig

SMALL = [
    "corpus.source.limit=4000",
    "corpus.source.rows_per_unit=512",
    "train.steps=120",
    "train.batch_size=128",
    "train.schedule.warmup_steps=20",
    "train.evaluation.every=60",
    "train.checkpoints.every=60",
    "train.model.image.image_size=32",
    "evaluate.splits=[zero_shot, zero_shot_style]",
    "index.factory='IVF16,Flat'",
    "index.nprobe=8",
    "serve.port=0",
]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The config of the small run; its artefacts are shared by the tests of this folder."""
    workspace: Path = tmp_path_factory.mktemp("run")
    return load(RunConfig, None, [f"workspace={workspace}", *SMALL])
