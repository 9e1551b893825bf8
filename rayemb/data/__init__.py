"""Corpora on Ray Data: build, read, stream into training, embed."""

from rayemb.data.build import build_corpus
from rayemb.data.config import CorpusConfig, EmbedConfig
from rayemb.data.corpus import Corpus, CorpusError
from rayemb.data.embed import embed_corpus, encode_images
from rayemb.data.embeddings import EmbeddingsError, EmbeddingsTable
from rayemb.data.stream import train_stream

__all__ = [
    "Corpus",
    "CorpusConfig",
    "CorpusError",
    "EmbedConfig",
    "EmbeddingsError",
    "EmbeddingsTable",
    "build_corpus",
    "embed_corpus",
    "encode_images",
    "train_stream",
]
