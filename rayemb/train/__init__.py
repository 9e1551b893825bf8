"""Contrastive training under Ray Train, each worker a DeepSpeed engine, negatives from all workers."""

from rayemb.train.config import TrainConfig
from rayemb.train.run import TrainError, train

__all__ = ["TrainConfig", "TrainError", "train"]
