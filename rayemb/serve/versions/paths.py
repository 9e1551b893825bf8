"""One address for each collection: /collections/NAME/... is what /... is for the service's own collection."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from rayemb.serve.versions.catalog import NAME

_PATH = re.compile(rf"/collections/({NAME.strip('^$')})(?=/)")


class Collections:
    """Middleware: takes the collection off the path, as a mount does, so that clients and the page need its URL alone.

    An OpenAI client's base URL is .../collections/NAME/v1; links in answers stay below it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's answer to one request."""
        if scope["type"] == "http":
            root = scope.get("root_path", "")
            found = _PATH.match(scope["path"].removeprefix(root))
            if found:
                state = {**scope.get("state", {}), "collection": found[1]}
                scope = {**scope, "root_path": root + found[0], "state": state}
        await self._app(scope, receive, send)
