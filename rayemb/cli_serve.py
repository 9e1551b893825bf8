"""`rayemb serve ...`: the service, its keys, its OpenAPI document, its .proto."""

import json
from typing import Annotated, Any

import typer
import typer.core

from rayemb.storage import normalise

Args = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file, if any, then overrides such as serve.port=8080 or workspace=s3://bucket/run.",
    ),
]
Keys = Annotated[str, typer.Option("--keys", help="The file of keys, path or URI: what serve.keys names.")]


class _Run(typer.core.TyperGroup):
    """`serve [CONFIG] ...` serves; `serve key ...`, `serve openapi` and `serve proto` do what they say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, `run` before them where the first word names no command."""
        known = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if known else ["run", *args])


serve_app = typer.Typer(
    cls=_Run, help="Serve the index over HTTP, with a web page, until Ctrl-C; keys; OpenAPI, .proto."
)
key_app = typer.Typer(no_args_is_help=True, help="API keys: make one, list them, revoke one.")
serve_app.add_typer(key_app, name="key")


@serve_app.command("run")
def run(args: Args = None) -> None:
    """Serve the index over HTTP, with a web page, until Ctrl-C. What `rayemb serve` does by itself."""
    from rayemb.cli import read_config
    from rayemb.pipeline.demo import serve_until_interrupted

    serve_until_interrupted(read_config(args))


@serve_app.command("openapi")
def openapi(
    args: Args = None, out: Annotated[str | None, typer.Option(help="File to write, path or URI.")] = None
) -> None:
    """The OpenAPI document of the service under this config, as JSON."""
    from rayemb.cli import read_config
    from rayemb.serve.asgi import openapi_document
    from rayemb.storage import write_json

    document = openapi_document(read_config(args).serve)
    if out is None:
        typer.echo(json.dumps(document, indent=2))
    else:
        write_json(normalise(out), document)


@serve_app.command("proto")
def proto() -> None:
    """The .proto of the service over gRPC (serve.grpc), to make clients from in any language."""
    from rayemb.serve.rpc.messages import PROTO

    typer.echo(PROTO.read_text(encoding="utf-8"), nl=False)


@key_app.command("new")
def key_new(
    name: Annotated[str, typer.Argument(help="Whose key it is; logs and metrics show it.")],
    keys: Keys,
    collection: Annotated[list[str] | None, typer.Option(help="Only this collection; may be repeated.")] = None,
    write: Annotated[bool, typer.Option("--write", help="It may write and delete items.")] = False,
    per_second: Annotated[float | None, typer.Option(help="Requests a second, at each gateway replica.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(min=1, help="Largest body of a request.")] = None,
    admin: Annotated[bool, typer.Option(help="It may change the catalog: /v1/collections.")] = False,
) -> None:
    """Make a key. It is shown this once; the file has its digest alone."""
    from rayemb.serve.keys import new_key

    secret = new_key(
        normalise(keys),
        name,
        collections=tuple(collection) if collection else None,
        write=write,
        per_second=per_second,
        max_body_bytes=max_body_bytes,
        admin=admin,
    )
    typer.echo(secret)


@key_app.command("list")
def key_list(keys: Keys, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """The keys of a file: names, limits, since when they are revoked."""
    from rich.console import Console
    from rich.table import Table

    from rayemb.serve.keys import read_keys

    found = [key.model_dump(mode="json", exclude={"sha256"}) for key in read_keys(normalise(keys))]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    names = ("name", "created", "revoked", "collections", "write", "admin", "per_second", "max_body_bytes")
    table = Table(*names)
    for key in found:
        table.add_row(*("" if key[name] is None else str(key[name]) for name in names))
    Console(highlight=False).print(table)


@key_app.command("revoke")
def key_revoke(name: Annotated[str, typer.Argument(help="The key's name.")], keys: Keys) -> None:
    """End a key; running services refuse it within seconds."""
    from rayemb.serve.keys import revoke_key

    revoke_key(normalise(keys), name)
