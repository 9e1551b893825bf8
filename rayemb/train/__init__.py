"""Contrastive training under Ray Train, each worker a DeepSpeed engine, negatives from all workers."""

from rayemb.train.config import TrainConfig
from rayemb.train.run import TrainError, train
from rayemb.train.soup import SoupConfig, SoupError, soup

__all__ = ["SoupConfig", "SoupError", "TrainConfig", "TrainError", "soup", "train"]
