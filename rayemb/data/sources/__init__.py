"""Where a corpus can come from. Each source is one file: a config, `units()` to plan, `read(unit)` to do the work."""

from typing import Annotated

from pydantic import Field

from rayemb.data.sources.base import RawRow, Source, SourceError
from rayemb.data.sources.columns import Columns
from rayemb.data.sources.csv import CsvSource
from rayemb.data.sources.datasets import DatasetsSource
from rayemb.data.sources.demo import DemoSource
from rayemb.data.sources.folder import FolderSource
from rayemb.data.sources.jsonl import JsonlSource
from rayemb.data.sources.lance import LanceSource
from rayemb.data.sources.parquet import ParquetSource
from rayemb.data.sources.webdataset import WebDatasetSource

AnySource = Annotated[
    DemoSource
    | FolderSource
    | ParquetSource
    | WebDatasetSource
    | JsonlSource
    | CsvSource
    | LanceSource
    | DatasetsSource,
    Field(discriminator="name"),
]

__all__ = [
    "AnySource",
    "Columns",
    "CsvSource",
    "DatasetsSource",
    "DemoSource",
    "FolderSource",
    "JsonlSource",
    "LanceSource",
    "ParquetSource",
    "RawRow",
    "Source",
    "SourceError",
    "WebDatasetSource",
]
