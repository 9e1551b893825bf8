"""Versions of collections: what there is, what is live, how a service changes from one to the next.

catalog.py    the document that says it         store.py     reading it, and changing it among other writers
opening.py    a version checked and opened      table.py     the open versions; a request holds one to its end
follow.py     the catalog's changes, applied    gate.py      what a version must pass to go live
changes.py    add, promote, canary, roll back   shadow.py    requests asked of a second version too
query_map.py  queries of one model, index of another
requirements.py  what labelled queries must show of it, as `rayemb evaluate --require` says it
"""

from rayemb.serve.versions.catalog import Canary, Catalog, Collection, Event, GateConfig, Version
from rayemb.serve.versions.store import CatalogError, CatalogStore, ConflictError

__all__ = [
    "Canary",
    "Catalog",
    "CatalogError",
    "CatalogStore",
    "Collection",
    "ConflictError",
    "Event",
    "GateConfig",
    "Version",
]
