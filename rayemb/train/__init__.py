"""Contrastive training under Ray Train, each worker a DeepSpeed engine, negatives from all workers."""

from rayemb.train.config import TrainConfig
from rayemb.train.run import Stretch, Tracked, TrainError, train, train_stretch
from rayemb.train.soup import SoupConfig, SoupError, soup

__all__ = [
    "SoupConfig",
    "SoupError",
    "Stretch",
    "Tracked",
    "TrainConfig",
    "TrainError",
    "soup",
    "train",
    "train_stretch",
]
