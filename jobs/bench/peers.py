"""The peers' own training loops, one process of them: started by `trainer.py` through torch's launcher.

open_clip: `open_clip_train.train.train_one_epoch` and its webdataset loader, DistributedDataParallel, ClipLoss with
`local_loss` and `gather_with_grad`, its AdamW groups and its schedule. sentence-transformers: its trainer with
MultipleNegativesRankingLoss(gather_across_devices). Both get rayemb's towers as they are before the first step.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.machinery
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayemb.models import Model, image_tensor


class AnyName(type):
    """Of classes that have whatever is asked of them."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Anything(types.ModuleType):
    """A stand-in for torchvision, of which there is no CPU build: open_clip imports it and this loop never calls it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


def without_torchvision() -> None:
    """Lets `import open_clip` through."""
    import transformers  # noqa: F401  # looks for torchvision itself, before there is a stand-in

    names = ("transforms", "transforms.functional", "ops", "ops.misc", "datasets")
    for name in ("torchvision", *(f"torchvision.{n}" for n in names)):
        module = Anything(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


class AllStepsTaken(Exception):  # noqa: N818  # no error
    """All steps are taken: the loop knows epochs only."""


class Clip(nn.Module):
    """rayemb's towers behind open_clip's interface."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.logit_scale = nn.Parameter(torch.tensor(temperature).reciprocal().log())

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Unit vectors of both towers and the scale of their products."""
        pictures, names = self.network(images, texts)
        return {"image_features": pictures, "text_features": names, "logit_scale": self.logit_scale.exp()}


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two parameter groups of `open_clip_train.main`."""
    named = list(module.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    rest = [p for _, p in named if not any(p is other for other in plain)]
    return [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": weight_decay}]


def picture(size: int, image: Any) -> Tensor:
    """A decoded picture as the tower takes it."""
    return torch.from_numpy(image_tensor(image, size))


def open_clip(spec: dict[str, Any], rank: int, world: int) -> None:
    """Trains and saves; rank 0 writes when each step began."""
    without_torchvision()
    theirs: list[Any] = [importlib.import_module(f"open_clip_train.{name}") for name in ("data", "scheduler", "train")]
    loader, scheduler, loop = theirs
    # Its own knows webdataset 0.2 only; this is what that one does.
    loader.tarfile_to_samples_nothrow = importlib.import_module("webdataset").tarfile_to_samples()

    model = Model.load(spec["init"])
    tokenizer, length = model.tokenizer, spec["context_length"]

    def tokens(text: str) -> Tensor:
        ids = torch.full((1, length), -1, dtype=torch.int64)
        found = torch.from_numpy(tokenizer([text]))[:, :length]
        ids[:, : found.shape[1]] = found
        return ids

    wrapped = Clip(model.network.train(), spec["temperature"])
    module = nn.parallel.DistributedDataParallel(wrapped)
    groups = decayed(wrapped, spec["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=spec["learning_rate"], betas=(0.9, 0.98), eps=1e-8)
    schedule = scheduler.cosine_lr(optimizer, spec["learning_rate"], spec["warmup_steps"], spec["steps"])
    began: list[float] = []

    def noted(step: int) -> None:
        began.append(time.time())
        if step >= spec["steps"]:
            raise AllStepsTaken
        schedule(step)

    args = argparse.Namespace(
        train_data=spec["tars"],
        train_num_samples=spec["rows"],
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=spec["seed"],
        workers=spec["loaders"],
        world_size=world,
        rank=rank,
        local_rank=rank,
        batch_size=spec["batch_size"] // world,
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=False,
        grad_clip_norm=1.0,
        horovod=False,
        distributed=True,
        log_every_n_steps=100,
        wandb=False,
    )
    preprocess = functools.partial(picture, model.network.config.image_size)
    data = {"train": loader.get_wds_dataset(args, preprocess, is_train=True, tokenizer=tokens)}
    clip_loss = importlib.import_module("open_clip.loss").ClipLoss
    loss = clip_loss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world)
    epoch = 0
    with contextlib.suppress(AllStepsTaken):
        while True:
            loop.train_one_epoch(module, data, loss, epoch, optimizer, None, noted, None, args)
            epoch += 1
    if rank == 0:
        finish(spec, began)
        model.network.eval()
        model.info = {"temperature": float(1 / wrapped.logit_scale.exp()), "training": []}
        model.save(spec["model"])


def sentence_transformers(spec: dict[str, Any], rank: int, world: int) -> None:
    """Trains and saves; rank 0 writes when each step ended."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from transformers import TrainerCallback

    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ended.append(time.time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.time())

    model = SentenceTransformer(spec["encoder"], device="cpu")
    model.max_seq_length = spec["context_length"]
    rows = [pq.read_table(path, columns=["query", "text"]) for path in spec["parquet"]]
    pairs = [pair for table in rows for pair in table.to_pylist()]
    data = Dataset.from_dict({"anchor": [p["query"] for p in pairs], "positive": [p["text"] for p in pairs]})
    loss = MultipleNegativesRankingLoss(model, scale=1 / spec["temperature"], gather_across_devices=True)
    settings = SentenceTransformerTrainingArguments(
        output_dir=f"{spec['model']}-run",
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["batch_size"] // world,
        learning_rate=spec["learning_rate"],
        weight_decay=spec["weight_decay"],
        warmup_steps=spec["warmup_steps"],
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        max_grad_norm=1.0,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        dataloader_num_workers=spec["loaders"],
        use_cpu=True,
        seed=spec["seed"],
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(model=model, args=settings, train_dataset=data, loss=loss, callbacks=[Clock()])
    trainer.train()
    if rank == 0:
        finish(spec, ended)
        model.save(spec["model"])


def finish(spec: dict[str, Any], times: list[float]) -> None:
    """Writes what was seen."""
    Path(spec["times"]).write_text(json.dumps(times))


def main() -> None:
    """Runs one process of a peer."""
    name, path = sys.argv[1:]
    spec = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    {"open_clip": open_clip, "sentence-transformers": sentence_transformers}[name](spec, rank, world)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
