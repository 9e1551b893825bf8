"""What can go wrong with an index, apart by who can mend it."""

from rayemb.errors import RayembError


class IndexArtefactError(RayembError):
    """An index that cannot be built, is missing, or is not what its manifest says."""


class QueryError(RayembError):
    """A query that no index can answer: wrong dimension, NaN, k below one, an unknown key."""


class FilterError(QueryError):
    """A filter on a field that does not exist, or a value of another type; `where` is `filter.<field>`."""


class UpdateError(QueryError):
    """An update that cannot be taken: an id, a vector or a payload that is wrong; `where` as `items[3].vector`."""


class UpdatesFullError(RayembError):
    """More updates than a reader may hold: compact them into the index first."""
