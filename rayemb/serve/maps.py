"""GET /v1/map: the map of the index that answers, which `rayemb index map` made."""

from typing import TYPE_CHECKING

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from rayemb.index import IndexArtefactError, IndexMap
from rayemb.serve.envelope import JsonResponse
from rayemb.serve.errors import ApiError
from rayemb.storage import StorageError

if TYPE_CHECKING:
    from rayemb.serve.gateway import Gateway


class MapResponse(IndexMap):
    """Points of a sample of the items, all lists in one order; an item's picture is at /v1/items/ID/image."""

    collection: str = Field(description="the collection", examples=["default"])
    version: str = Field(description="name of the version of it that answered", examples=["3f2a9c01d4e5"])


class Maps:
    """What the route of the map does."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    async def get(self, request: Request) -> Response:
        """The map of the version that answers; nothing is computed for it here."""
        gateway = self._gateway
        with gateway.taken(request, timed=False) as served:
            async with gateway.place():
                try:
                    found = await served.engine.map()
                except StorageError as error:
                    headers = {"Retry-After": str(gateway.config.retry_after_s)}
                    told = "the storage of the map does not answer"
                    raise ApiError(503, "storage_unavailable", told, headers=headers) from error
                except IndexArtefactError as error:
                    raise ApiError(404, "not_found", f"the map of this index cannot be shown: {error.what}") from error
            if found is None:
                told = f"no map of index version {served.about.index_version} was made: run `rayemb index map`"
                raise ApiError(404, "not_found", told)
            names = {"collection": served.collection, "version": served.version}
            # It is made anew for the same version, and says nothing of what a cache may keep.
            return JsonResponse({**found.model_dump(), **names}, headers={"Cache-Control": "no-cache"})
