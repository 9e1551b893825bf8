"""What goes wrong between a client and an index, in one shape."""

from rayemb.errors import RayembError


class ServeError(RayembError):
    """The service could not be started, or it answered with an error.

    Raised by `Client` with the server's own message: `status` is the HTTP status (0 where no answer came),
    `field` the part of the request that was wrong, `request_id` what to look for in the server's log.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        fix: str = "",
        status: int = 0,
        field: str = "",
        request_id: str = "",
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.status, self.field, self.request_id = status, field, request_id

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.what, self.where, self.fix, self.status, self.field, self.request_id)


def _rebuild(what: str, where: str, fix: str, status: int, field: str, request_id: str) -> ServeError:
    return ServeError(what, where=where, fix=fix, status=status, field=field, request_id=request_id)


class ApiError(Exception):
    """An answer other than 200: HTTP status, a short `kind` for machines, the message, the wrong field."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        field: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.field = status, kind, message, field
        self.headers = headers or {}


class ModelMismatchError(ApiError):
    """Vectors of a `model` that is not the one that answers."""

    def __init__(self, model: str, digest: str) -> None:
        told = f"the index is of model {digest}; vectors of another model do not compare"
        super().__init__(409, "model_mismatch", told, "model")
        self.model = model


class EngineUnavailable(RayembError):  # noqa: N818 - a state that passes, not a mistake
    """The engine cannot answer now (no live embedder, no live shard): worth a later try."""
