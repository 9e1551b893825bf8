"""Corpora on Ray Data: build, read, stream into training, embed."""

from rayemb.data.build import build_corpus
from rayemb.data.config import CorpusConfig, EmbedConfig
from rayemb.data.corpus import Corpus, CorpusError
from rayemb.data.embed import Embedded, embed_corpus
from rayemb.data.embeddings import EmbeddingsError, EmbeddingsTable
from rayemb.data.encode import encode_images
from rayemb.data.stream import Stream, StreamSettings, open_members, open_stream

__all__ = [
    "Corpus",
    "CorpusConfig",
    "CorpusError",
    "EmbedConfig",
    "Embedded",
    "EmbeddingsError",
    "EmbeddingsTable",
    "Stream",
    "StreamSettings",
    "build_corpus",
    "embed_corpus",
    "encode_images",
    "open_members",
    "open_stream",
]
