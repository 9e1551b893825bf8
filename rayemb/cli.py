"""The command line: `rayemb demo|recipe|data|curate|train|soup|report|evaluate|embed|index|mine|serve|collection|...`.

Every stage takes a YAML config and overrides: `rayemb train run.yaml train.steps=100`.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape

from rayemb import __version__
from rayemb.cli_collection import collection_app
from rayemb.cli_evaluate import compare, evaluate
from rayemb.cli_serve import serve_app
from rayemb.config import ConfigError, dump, load, schema
from rayemb.curate import Step
from rayemb.errors import RayembError
from rayemb.models.interchange import ExportFormat, ImportPooling
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.curation import step_help, step_overrides, steps

CONFIG_HELP = "A YAML file, if any, then overrides such as train.steps=100 or workspace=s3://bucket/run."
Args = Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help=CONFIG_HELP)]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn your own images and texts into search.",
)
data_app = typer.Typer(no_args_is_help=True, help="Corpora: build one, look at one.")
index_app = typer.Typer(
    no_args_is_help=True, help="Indexes: plan one, build one, take updates in, verify one, map one."
)
config_app = typer.Typer(no_args_is_help=True, help="Configs: the resolved one, and the schema.")


class _Steps(typer.core.TyperGroup):
    """`curate CONFIG ...` runs the config's steps; `curate STEP ...` that step alone."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The step's command, or `run` where the first word names none."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


curate_app = typer.Typer(
    cls=_Steps,
    no_args_is_help=True,
    help="Curate the corpus into a better one. Without the name of a step: the steps of the config, in order.",
)
app.add_typer(data_app, name="data")
app.add_typer(curate_app, name="curate")
app.add_typer(index_app, name="index")
app.add_typer(config_app, name="config")
app.add_typer(serve_app, name="serve")
app.add_typer(collection_app, name="collection")

errors = Console(stderr=True, highlight=False, soft_wrap=True)


@app.command()
def demo(
    args: Args = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running until Ctrl-C.")] = False,
) -> None:
    """The whole line on real data: corpus, training, report, embeddings, index, service, answers."""
    from rayemb.pipeline.demo import run_demo

    run_demo(read_config(args), keep=keep)


@data_app.command("build")
def data_build(args: Args = None) -> None:
    """Build the corpus: Parquet shards with a checked schema, bad rows set aside."""
    _stage("corpus", args)


@data_app.command("inspect")
def data_inspect(
    args: Args = None,
    source: Annotated[bool, typer.Option("--source", help="A sample of the source instead of the corpus.")] = False,
    html: Annotated[str | None, typer.Option(help="Also write a page with plots and thumbnails here.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every shard with its checksum first.")] = False,
    sample: Annotated[int, typer.Option(min=1, help="Rows that lengths and sizes are taken from.")] = 2000,
) -> None:
    """Counts, schema, bad rows, duplicates, lengths and sizes, and a sample of the corpus, or of its source."""
    from rayemb.pipeline.inspect import inspect

    inspect(read_config(args), Console(highlight=False), source=source, html=html, verify=verify, sample_rows=sample)


@curate_app.command("run")
def curate(args: Args = None) -> None:
    """Run the config's steps (curate.steps); run again to go on after an interruption."""
    _stage("curate", args)


def _add_step(name: str, step: type[Step]) -> None:
    @curate_app.command(name, help=escape(step_help(step)), short_help=step_help(step).split("\n")[0])
    def run(args: Args = None) -> None:
        _stage("curate", step_overrides(step, args or []))


for _name, _step in steps().items():
    _add_step(_name, _step)


@app.command()
def mine(args: Args = None) -> None:
    """Put hard negatives beside each row of the corpus: its nearest documents in the index that are no positives."""
    _stage("mine", args)


@app.command()
def train(args: Args = None) -> None:
    """Train the encoder on the corpus; run again to go on after an interruption."""
    _stage("train", args)


@app.command()
def soup(args: Args = None) -> None:
    """Average the weights of several models of one architecture (soup.models), all or by greedy choice."""
    _stage("soup", args)


@app.command()
def recipe(args: Args = None) -> None:
    """Run the steps of a recipe (steps: in the config), each reading what earlier ones made; run again to go on."""
    from rayemb.pipeline.plan import problems_of
    from rayemb.pipeline.recipe import run_recipe

    try:
        config = read_config(args)
    except ConfigError as error:
        raise problems_of(error) from error
    run_recipe(config)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or models.")],
    out: Annotated[str | None, typer.Option(help="Also write a page with curves here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Compare training runs: last and best values, settings that differ, curves."""
    from rayemb.pipeline.runs import report

    # As JSON the table is in nobody's way.
    found = report(runs, Console(highlight=False, stderr=as_json), out=out)
    if as_json:
        typer.echo(json.dumps(found.document, indent=2))


app.command()(evaluate)
app.command()(compare)


@app.command()
def embed(args: Args = None) -> None:
    """Embed the corpus into a Lance table."""
    _stage("embed", args)


@index_app.command("build")
def index_build(args: Args = None) -> None:
    """Build the sharded FAISS index and compare it with exact search."""
    _stage("index", args)


@index_app.command("plan")
def index_plan(
    args: Args = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Choose the index type for the embeddings under index.plan: bytes, recall and time, measured on a sample."""
    from dataclasses import asdict

    from rayemb.pipeline.index_plan import show_plan

    # As JSON the table is in nobody's way.
    plan = show_plan(read_config(args), Console(highlight=False, stderr=as_json))
    if as_json:
        typer.echo(json.dumps(asdict(plan), indent=2))


@index_app.command("verify")
def index_verify(args: Args = None) -> None:
    """Check an index: checksums, rows, model, recall against exact search."""
    _stage("verify", args)


@index_app.command("compact")
def index_compact(args: Args = None) -> None:
    """Take the live updates into the index, as its next version; searches and writes go on meanwhile."""
    _stage("compact", args)


@index_app.command("map")
def index_map(
    args: Args = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Lay a sample of the index out in the plane (index.map), for the web page of the service."""
    from rayemb.pipeline.index_map import make_map

    made = make_map(read_config(args), Console(highlight=False, stderr=as_json))
    if as_json:
        about = made.model_dump(mode="json", exclude={"ids", "x", "y", "columns"})
        typer.echo(json.dumps({**about, "points": len(made.ids), "columns": list(made.columns)}, indent=2))


@index_app.command("clusters")
def index_clusters(args: Args = None) -> None:
    """Cluster the embeddings of a split, for the sampler cluster_stratified."""
    _stage("clusters", args)


@index_app.command("neighbours")
def index_neighbours(args: Args = None) -> None:
    """Find each row's neighbours in the index, for the sampler locality."""
    _stage("neighbours", args)


@app.command()
def tune(args: Args = None) -> None:
    """Search temperature, margin or any other setting of the training with Ray Tune."""
    _stage("tune", args)


@app.command()
def search(
    text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image to look for, alone or with a text.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of answers.")] = 10,
    where: Annotated[list[str] | None, typer.Option("--filter", help="Metadata equality, column=value.")] = None,
    url: Annotated[str, typer.Option(help="The running service.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="RAYEMB_KEY", help="API key; rather in the environment than in a command line.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="Save the hits' pictures in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
) -> None:
    """Ask a running service."""
    from rayemb.pipeline.demo import hits_table, save_pictures
    from rayemb.serve import Client

    if text is None and image is None:
        raise RayembError("nothing to look for", where="search", fix="give a text, --image, or both")
    if unreadable := [item for item in where or [] if "=" not in item]:
        raise RayembError("a filter is written column=value", where=f"--filter {unreadable[0]}")
    try:
        picture = image.read_bytes() if image else None
    except OSError as error:
        raise RayembError(f"cannot read the image ({error.strerror})", where=f"--image {image}") from error
    client = Client(url, key=key)
    chosen = client.parse_filter(dict(item.split("=", 1) for item in where)) if where else None
    answer = client.search(text=text, image=picture, k=k, filter=chosen)
    paths = save_pictures(client, answer.hits, pictures) if pictures else None
    if as_json:
        document = answer.model_dump(mode="json")
        for hit in document["hits"] if paths else []:
            hit["picture"] = paths.get(hit["id"]) if paths else None
        typer.echo(json.dumps(document, indent=2))
    else:
        title = f"index {answer.index_version}, model {answer.model_digest[:12]}"
        if answer.partial:
            title += f"; partial: {', '.join(answer.missing_shards)} did not answer"
        Console(highlight=False).print(hits_table(title, answer.hits, paths))


@app.command("export")
def export_model(
    model: Annotated[str, typer.Argument(help="A rayemb model directory, path or URI.")],
    out: Annotated[str, typer.Argument(help="The new folder to write, path or URI.")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="sentence-transformers: the text tower as that library loads it, without rayemb. onnx: each tower as "
            "a graph, compared with the model before it is written. safetensors: the weights, and what each tensor is."
        ),
    ] = "sentence-transformers",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many layers of the text tower (loss starbucks).")
    ] = None,
    dim: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many coordinates (losses matryoshka, starbucks).")
    ] = None,
) -> None:
    """Write a model in a format of others, with a card that says how to use it."""
    from rayemb.models import Model
    from rayemb.models.interchange import export

    loaded = Model.load(model)
    if layers or dim:
        loaded = loaded.cut(layers, dim)
    files = export(loaded, out, format)
    typer.echo(f"{len(files)} files in {out}: {', '.join(files)}")
    if format == "sentence-transformers" and loaded.network.image is not None:
        typer.echo("the image tower is not part of it: sentence-transformers has no such network")


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="A sentence-transformers or transformers directory, path or URI.")],
    out: Annotated[str, typer.Argument(help="The new rayemb model directory, path or URI.")],
    pooling: Annotated[
        ImportPooling | None,
        typer.Option(help="For a plain transformers directory, which does not say; mean if left out."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a text at most; what the source says if left out.")
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Open pickled weights where there are no safetensors; as plain tensors alone."
        ),
    ] = False,
) -> None:
    """Make a rayemb model of one of others; train on it with train.init=OUT, or embed and serve it."""
    from rayemb.models import interchange

    model = interchange.import_model(source, out, pooling=pooling, max_length=max_length, allow_pickle=allow_pickle)
    typer.echo(
        f"model {str(model.digest)[:12]} in {out}: {model.dim} dimensions, {model.tokenizer.max_length} tokens a text"
    )


@config_app.command("show")
def config_show(args: Args = None) -> None:
    """The whole resolved config as YAML."""
    typer.echo(dump(read_config(args)), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """The JSON schema of the config, for editors."""
    typer.echo(schema(RunConfig))


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Every method a config can name: what it does, its source, and the test that shows it."""
    from dataclasses import asdict

    from rayemb.pipeline.methods import methods, table

    found = methods()
    if as_json:
        typer.echo(json.dumps([asdict(method) for method in found], indent=2))
    else:
        Console().print(table(found))


@app.command()
def version() -> None:
    """The version of rayemb and of what it stands on."""
    from importlib.metadata import version as of

    parts = {name: of(name) for name in ("ray", "torch", "deepspeed", "pyarrow", "pylance")}
    typer.echo(json.dumps({"rayemb": __version__, **parts}))


def read_config(args: list[str] | None) -> RunConfig:
    """The run's config from command-line arguments: at most one file, then overrides."""
    files = [arg for arg in args or [] if "=" not in arg]
    if len(files) > 1:
        raise RayembError("more than one config file", where=" ".join(files), fix="overrides are key=value")
    return load(RunConfig, files[0] if files else None, [arg for arg in args or [] if "=" in arg])


def _stage(name: str, args: list[str] | None) -> None:
    config = read_config(args)
    from rayemb.pipeline.stages import run_stage  # after the config is known to be right: it imports Ray

    run_stage(name, config)


def main() -> None:
    """The entry point: errors of ours become three lines and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except RayembError as error:
        errors.print("[red]error[/red] ", end="")
        errors.print(f"{error.where}: {error.what}" if error.where else error.what, markup=False)
        if error.fix:
            errors.print(f"      {error.fix}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
