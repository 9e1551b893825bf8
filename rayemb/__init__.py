"""rayemb turns corpora into search: Ray Data, DeepSpeed, FAISS and Ray Serve in one line of rooms."""

__version__ = "0.1.0"
