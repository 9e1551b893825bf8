"""Models in the formats of others, and models of others as ours."""

from rayemb.models.interchange.exporting import ExportFormat, export
from rayemb.models.interchange.importing import ImportPooling, import_model

__all__ = ["ExportFormat", "ImportPooling", "export", "import_model"]
