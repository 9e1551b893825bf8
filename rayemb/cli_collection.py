"""`rayemb collection ...`: the catalog's collections and versions."""

import json
from typing import Annotated, Any

import typer

from rayemb.config import from_mapping
from rayemb.storage import normalise

At = Annotated[
    str,
    typer.Option("--catalog", envvar="RAYEMB_CATALOG", help="The catalog, path or URI: what serve.catalog names."),
]
Collection = Annotated[str, typer.Argument(help="The collection.")]
Version = Annotated[str, typer.Argument(help="The version's name.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]

collection_app = typer.Typer(
    no_args_is_help=True,
    help="Versions of collections: add one, make it the live one, roll back. Running services follow within seconds.",
)


@collection_app.command("list")
def show(catalog: At, as_json: Json = False) -> None:
    """The collections and their versions."""
    from rich.console import Console
    from rich.table import Table

    from rayemb.serve.versions import CatalogStore

    found = CatalogStore(normalise(catalog)).read()
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    table = Table("collection", "version", "in use", "index", "model", "rows", "added")
    for name, collection in found.collections.items():
        for version, entry in collection.versions.items():
            roles = ", ".join(_role(collection, role) for role, each in collection.roles.items() if each == version)
            rows, model = f"{entry.rows:,}", entry.model_digest[:12]
            table.add_row(name, version, roles, entry.index_version, model, rows, entry.added)
    Console(highlight=False).print(table)


def _role(collection: Any, role: str) -> str:
    beside = getattr(collection, role) if role != "live" else None
    return f"{role} {beside.percent:g} %" if beside else role


@collection_app.command("add")
def add(
    collection: Collection,
    catalog: At,
    model: Annotated[str, typer.Option(help="The model directory, path or URI.")],
    index: Annotated[str, typer.Option(help="The index, path or URI, in a folder of its own.")],
    name: Annotated[str | None, typer.Option(help="What to call it; default: the index's version.")] = None,
    query_map: Annotated[
        str | None, typer.Option(help="Map of queries (safetensors), where the index is of another model.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help='Labelled queries for the gate, JSON lines: {"text", "relevant": [id, ...]}.')
    ] = None,
    as_json: Json = False,
) -> None:
    """Add a version, which answers nobody until it is promoted. The catalog is made if there is none."""
    from rayemb.serve.versions import CatalogStore, changes

    store = CatalogStore(normalise(catalog))
    uri = normalise(query_map) if query_map else None
    added = changes.add(store, collection, model, index, name=name, query_map=uri, labels=labels)
    _print(store.read(), collection, f"added version {added}", as_json)


@collection_app.command("promote")
def promote(
    collection: Collection,
    version: Version,
    catalog: At,
    min_recall: Annotated[float, typer.Option(min=0, max=1, help="Least recall of the index, of its manifest.")] = 0.9,
    k: Annotated[int, typer.Option(min=1, help="Hits of a labelled query among which a relevant item counts.")] = 10,
    margin: Annotated[float, typer.Option(min=0, max=1, help="How much fewer labelled queries may be met.")] = 0.02,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'METRIC>=NUMBER'",
            help="What the labelled queries must show, as 'ndcg@10>=0.4', or 'low(gain(recall@10))>=0' on the live "
            "version; may be repeated.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Also if the gate refuses; the history will say so.")] = False,
    as_json: Json = False,
) -> None:
    """Make a version the live one, if it opens and the gate lets it pass."""
    from rayemb.serve.versions import CatalogStore, GateConfig, changes

    asked = {"min_recall": min_recall, "k": k, "margin": margin, "require": tuple(require or ())}
    gate = from_mapping(GateConfig, asked, source="gate")
    found = changes.promote(CatalogStore(normalise(catalog)), collection, version, gate, force=force)
    _print(found, collection, f"version {version} is live", as_json)


@collection_app.command("canary")
def canary(
    collection: Collection,
    version: Version,
    percent: Annotated[float, typer.Argument(min=0, max=100, help="Share of the requests; 0 ends it.")],
    catalog: At,
    as_json: Json = False,
) -> None:
    """Give a version a share of the requests."""
    from rayemb.serve.versions import CatalogStore, changes

    found = changes.set_canary(CatalogStore(normalise(catalog)), collection, version, percent)
    _print(found, collection, f"version {version} gets {percent:g} % of the requests", as_json)


@collection_app.command("shadow")
def shadow(
    collection: Collection,
    version: Version,
    percent: Annotated[float, typer.Argument(min=0, max=100, help="Share of the requests; 0 ends it.")],
    catalog: At,
    as_json: Json = False,
) -> None:
    """Ask a version a share of the requests too, to compare; nobody gets its answers."""
    from rayemb.serve.versions import CatalogStore, changes

    found = changes.set_shadow(CatalogStore(normalise(catalog)), collection, version, percent)
    _print(found, collection, f"version {version} is asked {percent:g} % of the requests too", as_json)


@collection_app.command("rollback")
def rollback(collection: Collection, catalog: At, as_json: Json = False) -> None:
    """Make that version live again which was before the one that is."""
    from rayemb.serve.versions import CatalogStore, changes

    found = changes.rollback(CatalogStore(normalise(catalog)), collection)
    _print(found, collection, f"version {found.collections[collection].live} is live again", as_json)


@collection_app.command("remove")
def remove(collection: Collection, version: Version, catalog: At, as_json: Json = False) -> None:
    """Take a version out of the catalog; its files stay where they are."""
    from rayemb.serve.versions import CatalogStore, changes

    found = changes.remove(CatalogStore(normalise(catalog)), collection, version)
    _print(found, collection, f"version {version} is no longer in the catalog", as_json)


@collection_app.command("status")
def status(
    url: Annotated[str, typer.Option(help="The running service.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="RAYEMB_KEY", help="API key; rather in the environment than in a command line.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a running service answers from, how its shadow compares, what its quality watch has seen."""
    from rich.console import Console
    from rich.table import Table

    from rayemb.serve import Client

    with Client(url, key=key) as client:
        found = client.collections()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console, table = Console(highlight=False), Table("collection", "role", "version", "index", "rows", "quality")
    for name, collection in found["collections"].items():
        for role, each in collection["serving"].items():
            quality = {**each["quality"], **collection["compared"].get(each["version"], {})}
            told = ", ".join(f"{what} {value:g}" for what, value in quality.items())
            table.add_row(name, role, each["version"], each["index_version"], f"{each['rows']:,}", told)
    console.print(table)
    for what, told in found["problems"].items():
        console.print(f"{what} is not served as the catalog says: {told}", markup=False)


def _print(found: Any, collection: str, told: str, as_json: bool) -> None:
    entry = found.collections[collection]
    if as_json:
        document = {"revision": found.revision, "collection": entry.model_dump(mode="json")}
        typer.echo(json.dumps(document, indent=2))
    else:
        typer.echo(f"{collection}: {told} (catalog revision {found.revision}, live: {entry.live or 'nothing'})")
