"""/v1/collections: what is served of the catalog, and changes of it by keys that may."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field, JsonValue, field_validator
from starlette.responses import Response

from rayemb.errors import RayembError
from rayemb.serve.api import Strict
from rayemb.serve.envelope import JsonResponse
from rayemb.serve.errors import ApiError
from rayemb.serve.limits import remaining
from rayemb.serve.parse import json_object, validated
from rayemb.serve.versions import changes
from rayemb.serve.versions.catalog import NAME, Catalog, GateConfig, checked
from rayemb.serve.versions.follow import CatalogFollower
from rayemb.serve.versions.store import CatalogError

if TYPE_CHECKING:
    from rayemb.serve.gateway import Gateway

_LONGEST_S = 60.0


class NewVersion(Strict):
    """A model and its index."""

    model: str = Field(min_length=1, description="URI of the model directory")
    index: str = Field(min_length=1, description="URI of the index")
    name: str | None = Field(None, pattern=NAME, description="what to call it; default: the index's version")
    query_map: str | None = Field(None, description="URI of a map of queries, where the index is of another model")
    labels: str | None = Field(None, description="URI of labelled queries, which promotion judges by")


class Promotion(Strict):
    """Which version is to be live."""

    version: str = Field(pattern=NAME, description="its name")
    force: bool = Field(False, description="also if the gate refuses, which the history then says")
    min_recall: float | None = Field(None, ge=0, le=1, description="instead of serve.gate.min_recall")
    margin: float | None = Field(None, ge=0, le=1, description="instead of serve.gate.margin")
    require: list[str] | None = Field(None, max_length=32, description="instead of serve.gate.require")

    @field_validator("require")
    @classmethod
    def _are_requirements(cls, value: list[str] | None) -> list[str] | None:
        checked(value or ())
        return value


class Share(Strict):
    """A version beside the live one."""

    version: str = Field(pattern=NAME, description="its name")
    percent: float = Field(ge=0, le=100, description="share of the requests, in percent; 0 ends it")


class Nothing(Strict):
    """An empty object."""


class CollectionsInfo(BaseModel):
    """The catalog as this replica serves it."""

    revision: int = Field(description="revision of the catalog that is served")
    problems: dict[str, str] = Field(description="what is not served as the catalog says, and why")
    collections: dict[str, dict[str, JsonValue]] = Field(
        description="of each: live, canary, shadow, versions and history as in the catalog; `serving`, the versions "
        "that answer here, with what the quality watch knows; `compared`, what the shadow would have answered"
    )


class Changed(BaseModel):
    """What a change led to."""

    revision: int = Field(description="revision of the catalog with the change")
    applied: bool = Field(description="whether this replica serves it already; the others follow within seconds")
    version: str | None = Field(None, description="the version that was added")
    collection: dict[str, JsonValue] = Field(description="the collection's entry in the catalog")


class Administration:
    """What the routes do."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    @property
    def _follower(self) -> CatalogFollower:
        assert self._gateway.follower is not None
        return self._gateway.follower

    async def list(self, request: Request) -> Response:
        """The collections that the key opens."""
        follower, opens = self._follower, request.scope["state"].get("opens")
        found = {
            name: {**entry.model_dump(mode="json"), **self._serving(name)}
            for name, entry in follower.catalog.collections.items()
            if opens is None or name in opens
        }
        problems = {what: told for what, told in follower.problems.items() if opens is None}
        return JsonResponse({"revision": follower.catalog.revision, "problems": problems, "collections": found})

    async def add(self, collection: str, request: Request) -> Response:
        """Adds a version."""
        body = await self._allowed(request, collection, NewVersion)
        store, added = self._follower.store, []

        def change() -> Catalog:
            given = body.model_dump(include={"name", "query_map", "labels"})
            added.append(changes.add(store, collection, body.model, body.index, **given))
            return store.read()

        return await self._do(collection, change, added)

    async def promote(self, collection: str, request: Request) -> Response:
        """Makes a version the live one."""
        body = await self._allowed(request, collection, Promotion)
        config = self._gateway.config
        given = body.model_dump(include={"min_recall", "margin", "require"}, exclude_none=True)
        gate = GateConfig(**{**config.gate.model_dump(), **given})
        store = self._follower.store
        return await self._do(
            collection,
            lambda: changes.promote(store, collection, body.version, gate, force=body.force, config=config),
        )

    async def rollback(self, collection: str, request: Request) -> Response:
        """Makes the version before the live one."""
        await self._allowed(request, collection, Nothing)
        store, config = self._follower.store, self._gateway.config
        return await self._do(collection, lambda: changes.rollback(store, collection, config))

    async def canary(self, collection: str, request: Request) -> Response:
        """Gives a version a share of the requests."""
        body = await self._allowed(request, collection, Share)
        store = self._follower.store
        return await self._do(collection, lambda: changes.set_canary(store, collection, body.version, body.percent))

    async def shadow(self, collection: str, request: Request) -> Response:
        """Asks a version a share of the requests too."""
        body = await self._allowed(request, collection, Share)
        store = self._follower.store
        return await self._do(collection, lambda: changes.set_shadow(store, collection, body.version, body.percent))

    async def remove(self, collection: str, version: str, request: Request) -> Response:
        """Takes a version out."""
        self._check(request, collection)
        store = self._follower.store
        return await self._do(collection, lambda: changes.remove(store, collection, version))

    def _serving(self, name: str) -> dict[str, Any]:
        gateway = self._gateway
        serving = {}
        with gateway.versions.held() as table:
            for role, served in (table[name].roles if name in table else {}).items():
                about = served.about
                serving[role] = {
                    "version": served.version,
                    "index_version": about.index_version,
                    "model_digest": about.model_digest,
                    "rows": about.rows,
                    "quality": gateway.watch.figures(name, served.version),
                }
        compared = {key[1]: each.figures() for key, each in gateway.shadows.compared.items() if key[0] == name}
        return {"serving": serving, "compared": compared}

    def _check(self, request: Request, collection: str) -> None:
        state = request.scope["state"]
        if not state.get("admin"):
            # Without keys too: whoever reaches a port must not name files for the service to open.
            told = "changes need a key that may make them (rayemb serve key new NAME --admin)"
            raise ApiError(403, "forbidden", told, "authorization")
        if state.get("opens") is not None and collection not in state["opens"]:
            raise ApiError(403, "forbidden", f"this key does not open {collection!r}", "authorization")

    async def _allowed(self, request: Request, collection: str, body: Any) -> Any:
        self._check(request, collection)
        return validated(body, await json_object(request))

    async def _do(self, collection: str, change: Callable[[], Catalog], added: Any = ()) -> Response:
        """The change, in a thread, and this replica at it. One that outlasts the request is made all the same."""
        try:
            catalog = await asyncio.to_thread(change)
        except CatalogError as error:
            raise ApiError(409, "refused", _told(error)) from error
        except RayembError as error:
            raise ApiError(422, "invalid_request", _told(error)) from error
        applied = await asyncio.to_thread(self._follower.look, catalog.revision, remaining(_LONGEST_S) * 0.9)
        entry = catalog.collections[collection].model_dump(mode="json")
        document = {"revision": catalog.revision, "applied": applied, "collection": entry}
        return JsonResponse({**document, "version": added[0] if added else None})


def add_collection_routes(
    app: FastAPI, add: Callable[..., None], problems: dict[int | str, dict[str, Any]], what: Administration
) -> None:
    """Adds the routes of `what` by `add`, as `rayemb.serve.routes` does."""
    add(
        "/v1/collections",
        "GET",
        what.list,
        "Collections, their versions, and how they do",
        response_model=CollectionsInfo,
        responses=problems,
    )
    one = "/v1/collections/{collection}"
    for path, endpoint, summary, body in (
        ("/versions", what.add, "Add a version", NewVersion),
        ("/promote", what.promote, "Make a version the live one", Promotion),
        ("/rollback", what.rollback, "Make the version before the live one", Nothing),
        ("/canary", what.canary, "Give a version a share of the requests", Share),
        ("/shadow", what.shadow, "Ask a version a share of the requests too", Share),
    ):
        schema = {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}
        add(one + path, "POST", endpoint, summary, {"requestBody": schema}, response_model=Changed, responses=problems)
    add(
        one + "/versions/{version}",
        "DELETE",
        what.remove,
        "Take a version out of the catalog",
        response_model=Changed,
        responses=problems,
    )


def _told(error: RayembError) -> str:
    return f"{error.what}; {error.fix}" if error.fix else error.what
