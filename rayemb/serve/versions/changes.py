"""Changes of a catalog, each checked before anything of it is written."""

from collections.abc import Callable

from rayemb.serve.config import ServeConfig
from rayemb.serve.versions.catalog import Canary, Catalog, Collection, Event, GateConfig, Version, is_name
from rayemb.serve.versions.gate import judge
from rayemb.serve.versions.opening import Opener, new_version, now
from rayemb.serve.versions.store import CatalogError, CatalogStore, ConflictError


def add(
    store: CatalogStore,
    collection: str,
    model_uri: str,
    index_uri: str,
    *,
    name: str | None = None,
    query_map: str | None = None,
    labels: str | None = None,
) -> str:
    """Adds a version, which nobody is answered by yet, and gives its name (default: the index's version).

    Raises ModelError, IndexArtefactError or ServeError where model and index are missing or do not belong together;
    CatalogError for a name that is taken or cannot be one.
    """
    version = new_version(model_uri, index_uri, query_map=query_map, labels=labels)
    chosen = name or version.index_version
    for what, text in (("collection", collection), ("version", chosen)):
        if not is_name(text):
            fix = "up to 64 letters, digits, dots, dashes and underscores, a letter or digit first"
            raise CatalogError(f"{text!r} cannot be the name of a {what}", where=store.uri, fix=fix)

    def change(catalog: Catalog) -> Catalog:
        found = catalog.collections.get(collection, Collection())
        if chosen in found.versions:
            raise CatalogError(f"there is a version {chosen!r} already", where=f"{store.uri}, {collection}")
        versions = {**found.versions, chosen: version}
        return catalog.with_collection(
            collection, found.with_event(Event(at=now(), action="add", version=chosen), versions=versions)
        )

    store.update(change)
    return chosen


def promote(
    store: CatalogStore,
    collection: str,
    version: str,
    gate: GateConfig | None = None,
    *,
    force: bool = False,
    config: ServeConfig | None = None,
) -> Catalog:
    """Makes a version the live one, if it opens and passes the gate; gives the catalog after it.

    The version is opened here, every checksum verified, before anything changes. `force`: also if the gate refuses,
    which the history then says; never if it does not open.

    Raises CatalogError for an unknown version and for what the gate refuses; ConflictError if the live version or the
    entry changed meanwhile; and what `Opener.open` raises.
    """
    seen = _collection(store, store.read(), collection)
    entry = _version(store, seen, collection, version)
    opener = Opener(config or ServeConfig())
    engine = opener.open(entry)
    try:
        live = seen.versions[seen.live] if seen.live and seen.live != version and entry.labels else None
        beside = opener.open(live) if live else None
        try:
            verdict = judge(entry, engine, beside, gate or GateConfig())
        finally:
            if beside:
                beside.close()
    finally:
        engine.close()
    if verdict.problems and not force:
        raise CatalogError(
            f"version {version!r} may not go live: {'; '.join(verdict.problems)}",
            where=f"{store.uri}, {collection}",
            fix="make a better one, ask for less, or overrule the gate (--force), which the history will say",
        )

    def change(catalog: Catalog) -> Catalog:
        found = _collection(store, catalog, collection)
        if found.live != seen.live or found.versions.get(version) != entry:
            raise ConflictError(f"somebody else changed {collection!r} meanwhile", where=store.uri, fix="look again")
        event = Event(
            at=now(),
            action="promote",
            version=version,
            before=found.live,
            forced="; ".join(verdict.problems) or None,
            figures=verdict.figures,
        )
        return catalog.with_collection(collection, found.with_event(event, **_going_live(found, version)))

    return store.update(change)


def set_canary(store: CatalogStore, collection: str, version: str, percent: float) -> Catalog:
    """Gives a version some percent of the requests; 0 ends it. Raises CatalogError, and what `Opener.open` raises."""
    return _beside(store, collection, version, percent, "canary")


def set_shadow(store: CatalogStore, collection: str, version: str, percent: float) -> Catalog:
    """Asks a version some percent of the requests too, which nobody sees; 0 ends it. Raises as `set_canary`."""
    return _beside(store, collection, version, percent, "shadow")


def _beside(store: CatalogStore, collection: str, version: str, percent: float, role: str) -> Catalog:
    if not 0 <= percent <= 100:
        raise CatalogError(f"a share is 0 to 100 percent, not {percent:g}", where="percent")
    if percent:
        entry = _version(store, _collection(store, store.read(), collection), collection, version)
        Opener(ServeConfig()).open(entry).close()

    def change(found: Collection) -> Collection:
        _version(store, found, collection, version)
        if found.live is None:
            fix = "promote a version first"
            raise CatalogError(f"nothing is live in {collection!r} to have a {role} beside", where=store.uri, fix=fix)
        if found.live == version and percent:
            raise CatalogError(f"version {version!r} is the live one", where=f"{store.uri}, {collection}")
        value = Canary(version=version, percent=percent) if percent else None
        event = Event(at=now(), action="canary" if role == "canary" else "shadow", version=version)
        return found.with_event(event, **{role: value})

    return _changed(store, collection, change)


def rollback(store: CatalogStore, collection: str, config: ServeConfig | None = None) -> Catalog:
    """Makes that version live again which was before the one that is; a second time, the one before that.

    It is opened first; the gate is not asked: it has been live. Raises CatalogError if there is none, and what
    `Opener.open` raises.
    """
    seen = _collection(store, store.read(), collection)
    wanted = _before(store, seen, collection)
    Opener(config or ServeConfig()).open(seen.versions[wanted]).close()

    def change(found: Collection) -> Collection:
        if found.live != seen.live or found.versions.get(wanted) != seen.versions[wanted]:
            raise ConflictError(f"somebody else changed {collection!r} meanwhile", where=store.uri, fix="look again")
        event = Event(at=now(), action="rollback", version=wanted, before=found.live)
        return found.with_event(event, **_going_live(found, wanted))

    return _changed(store, collection, change)


def remove(store: CatalogStore, collection: str, version: str) -> Catalog:
    """Takes a version out of the catalog; its files stay. Raises CatalogError for one that is in use."""

    def change(found: Collection) -> Collection:
        _version(store, found, collection, version)
        roles = [role for role, name in found.roles.items() if name == version]
        if roles:
            raise CatalogError(
                f"version {version!r} is in use: {', '.join(roles)}",
                where=f"{store.uri}, {collection}",
                fix="promote another first, or end it with 0 percent",
            )
        versions = {name: each for name, each in found.versions.items() if name != version}
        return found.with_event(Event(at=now(), action="remove", version=version), versions=versions)

    return _changed(store, collection, change)


def _changed(store: CatalogStore, collection: str, change: Callable[[Collection], Collection]) -> Catalog:
    def whole(catalog: Catalog) -> Catalog:
        return catalog.with_collection(collection, change(_collection(store, catalog, collection)))

    return store.update(whole)


def _going_live(found: Collection, version: str) -> dict[str, object]:
    """What changes with the live version: it is no canary or shadow of itself."""
    return {
        "live": version,
        "canary": None if found.canary and found.canary.version == version else found.canary,
        "shadow": None if found.shadow and found.shadow.version == version else found.shadow,
    }


def _before(store: CatalogStore, found: Collection, collection: str) -> str:
    for event in reversed(found.history):
        if event.action == "promote" and event.version == found.live and event.before in found.versions:
            return event.before
    raise CatalogError(
        f"no version of {collection!r} was live before {found.live!r}, or it was removed",
        where=store.uri,
        fix="promote one",
    )


def _collection(store: CatalogStore, catalog: Catalog, name: str) -> Collection:
    if name not in catalog.collections:
        known = ", ".join(catalog.collections) or "none"
        raise CatalogError(f"there is no collection {name!r}", where=store.uri, fix=f"there are: {known}")
    return catalog.collections[name]


def _version(store: CatalogStore, found: Collection, collection: str, name: str) -> Version:
    if name not in found.versions:
        known = ", ".join(found.versions) or "none"
        raise CatalogError(
            f"there is no version {name!r}", where=f"{store.uri}, {collection}", fix=f"there are: {known}"
        )
    return found.versions[name]
