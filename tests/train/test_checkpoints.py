"""A checkpoint is whole or it is none; which ones are kept; one that does not fit the run is refused by name."""

import json
import os
from pathlib import Path

import pytest

from rayemb.train.checkpoints import FOLDER, Checkpoints, CheckpointsConfig, committed, newest, restore, shapes, sweep
from tests.parallel.processes import run_processes
from tests.train.test_reshard import engine_of


def write(run: Path, step: int, *, recall: float | None = None, whole: bool = True) -> str:
    folder = run / FOLDER / f"step-{step:09d}-aa"
    (folder / f"step-{step}").mkdir(parents=True)
    (folder / f"step-{step}/part").write_bytes(b"x" * step)
    metrics = {"loss": 1.0} if recall is None else {"loss": 1.0, "val/recall@1": recall}
    if whole:
        position = {"step": step, "metrics": metrics, "files": {f"step-{step}/part": step}}
        (folder / "position.json").write_text(json.dumps(position))
    return str(folder)


def test_what_an_interrupted_upload_left_is_no_checkpoint_and_is_swept_away(tmp_path: Path) -> None:
    first, half = write(tmp_path, 10), write(tmp_path, 20, whole=False)
    assert committed(str(tmp_path)) == [first]
    found = newest(str(tmp_path))
    assert found is not None
    assert (found[0], found[1]["step"]) == (first, 10)
    sweep(str(tmp_path))
    assert not Path(half).exists()
    assert Path(first).exists()
    assert newest(str(tmp_path / "elsewhere")) is None


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, last = write(tmp_path, 10), write(tmp_path, 20)
    (Path(last) / "step-20/part").write_bytes(b"cut")
    found = newest(str(tmp_path))
    assert found is not None
    assert found[0] == first
    assert "step-20/part has 3 bytes and not 20" in caplog.text
    (Path(first) / "step-10/part").unlink()
    assert newest(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 1}, [50]),
        ({"keep": 2}, [40, 50]),
        ({"keep": 1, "keep_best": 2}, [10, 30, 50]),
        ({"keep": 1, "keep_best": 1, "mode": "min"}, [20, 50]),
        ({"keep": 1, "keep_best": 9, "metric": "other"}, [50]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, options: dict[str, object], kept: list[int]) -> None:
    for step, recall in ((10, 0.5), (20, 0.1), (30, 0.6), (40, None), (50, 0.2)):
        write(tmp_path, step, recall=recall)
    config = CheckpointsConfig.model_validate(options)
    Checkpoints(config, str(tmp_path), "aa", None, 0, 1)._prune()
    steps = [json.loads((Path(uri) / "position.json").read_text())["step"] for uri in committed(str(tmp_path))]
    assert steps == kept
    assert len(list((tmp_path / FOLDER).iterdir())) == len(kept)


def refusals(rank: int, world: int, uri: str) -> list[str]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    engine = engine_of(2, "fp32")
    found = []
    for stage, changes in ((3, {}), (2, {"body.0.weight": [8, 7]}), (2, {"extra": [1]})):
        position = {"step": 1, "zero_stage": stage, "parameters": {**shapes(engine.module), **changes}}
        (Path(uri) / "position.json").write_text(json.dumps(position))
        try:
            restore(engine, uri, 0)
        except Exception as error:
            found.append(f"{type(error).__name__} {error}")
    return found


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture_is_refused_by_the_parameters_name(tmp_path: Path) -> None:
    (found,) = run_processes(1, refusals, str(tmp_path))
    stage, shape, name = found
    assert stage.startswith(f"CheckpointError {tmp_path}: it was written at ZeRO stage 3 and the run is at 2")
    assert "parameter body.0.weight has shape [8, 7] there and [13, 7] in this model" in shape
    assert "parameter extra has shape [1] there and none in this model" in name
