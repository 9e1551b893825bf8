"""Where a corpus can come from. Each source is one file: a config, `units()` to plan, `read(unit)` to do the work."""

from typing import Annotated

from pydantic import Field

from rayemb.data.sources.base import RawRow, Source, SourceError
from rayemb.data.sources.demo import DemoSource
from rayemb.data.sources.folder import FolderSource
from rayemb.data.sources.table import ParquetSource

AnySource = Annotated[DemoSource | FolderSource | ParquetSource, Field(discriminator="name")]

__all__ = ["AnySource", "DemoSource", "FolderSource", "ParquetSource", "RawRow", "Source", "SourceError"]
