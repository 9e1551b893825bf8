"""The model card: the README.md of a model's directory and of everything that is exported from it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rayemb.models.two_tower import TwoTowerConfig

_SAID_ELSEWHERE = {"model", "init", "loss", "corpora", "mix"}


@dataclass(frozen=True)
class Facts:
    """What a card tells of a model: its towers, what the trainer recorded, and its digest."""

    towers: TwoTowerConfig
    info: dict[str, Any]
    digest: str | None


def card(facts: Facts, *, library: str = "rayemb", usage: str | None = None, notes: str = "") -> str:
    """The card as Markdown with the front matter that model hubs read.

    `usage`: how to use it, as Markdown; by default with rayemb. `notes`: what else there is to say of this directory.
    """
    towers = facts.towers
    kind = "Images and texts" if towers.image else "Texts"
    what = "an image and text" if towers.image else "a text"
    parts = [
        _front_matter(towers, library, facts.info.get("license")),
        f"# {what[0].upper()}{what[1:]} embedding model",
        f"{kind} become unit vectors of {towers.dim} dimensions; compare them by inner product, which is the cosine. "
        + _origin(facts),
        notes,
        "## How to use",
        usage or _usage(towers),
        "## The model",
        _table(_model(towers)),
        _ingredients(facts.info),
        _data(facts.info),
        _loss(facts.info),
        _settings(facts.info),
        _metrics(facts.info),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _front_matter(towers: TwoTowerConfig, library: str, licence: str | None) -> str:
    tags = ["embeddings", "feature-extraction", "contrastive-learning", "rayemb"]
    tags += ["image-text-retrieval"] if towers.image else ["sentence-similarity"]
    if library != "rayemb":
        tags.append(library)
    # What is in a directory of sentence-transformers is the text tower.
    texts = towers.image is None or library == "sentence-transformers"
    head: dict[str, Any] = {
        **({"license": licence} if licence else {}),
        "library_name": library,
        "pipeline_tag": "sentence-similarity" if texts else "zero-shot-image-classification",
        "tags": tags,
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---"


def _origin(facts: Facts) -> str:
    digest = f"Digest of the rayemb model: `{facts.digest}`." if facts.digest else ""
    init = facts.info.get("init")
    if init:
        digest += f" Its training began from the model `{init.get('digest')}`."
    imported = facts.info.get("imported")
    if imported:
        digest += f" Imported from {imported['format']} weights (sha256 `{imported['sha256']}`)."
    return digest


def _usage(towers: TwoTowerConfig) -> str:
    lines = [
        "from rayemb.models import Model",
        "",
        'model = Model.load(".")  # this directory',
        f'texts = model.embed_texts(["a red heart", "a blue star"])  # (2, {towers.dim}) float32, unit rows',
        'queries = model.embed_texts(["heart"], kind="query")',
        "print(queries @ texts.T)",
    ]
    if towers.image:
        lines[1:1] = ["from PIL import Image"]
        lines += [
            'images = model.embed_images([Image.new("RGB", (64, 64), "red")])  # or the bytes of image files',
            "print(images @ texts.T)",
        ]
    code = "\n".join(lines)
    others = "For other libraries: `rayemb export THIS_DIRECTORY OUT --format sentence-transformers` (or `onnx`)."
    return f"```python\n{code}\n```\n\n{others}"


def _model(towers: TwoTowerConfig) -> list[tuple[str, Any]]:
    text = towers.text
    kind = getattr(text, "architecture", None)
    rows: list[tuple[str, Any]] = [
        ("dimensions", towers.dim),
        ("text tower", f"{text.name} ({kind['model_type']})" if kind else text.name),
        ("tokens of a text at most", towers.tokenizer.max_length),
        ("pooling", text.pooling.name),
    ]
    if towers.image:
        rows += [("image tower", towers.image.name), ("side of an image", f"{towers.image_size} pixels")]
    for name, prompt in (("query", towers.prompts.query), ("text", towers.prompts.text)):
        if prompt:
            rows.append((f"prompt of a {name}", json.dumps(prompt, ensure_ascii=False)))
    return rows


def _ingredients(info: dict[str, Any]) -> str:
    soup = info.get("soup")
    if not soup:
        return ""
    about = "The weights are the mean of those of several models (a model soup)."
    if "metric" in soup:
        about = (
            "The weights are the mean of those of some models (a greedy soup), chosen on held-out rows by "
            f"`{soup['metric']}`: {_value(soup['value'])} for the mean."
        )
    head = "| model | weight |" + (" alone |\n|---|---|---|\n" if "metric" in soup else "\n|---|---|\n")
    rows = []
    for each in soup["ingredients"]:
        alone = f" {_value(each['alone'])} |" if "alone" in each else ""
        rows.append(f"| `{each['digest']}` | {_value(each['weight'])} |{alone}")
    return "## Ingredients\n\n" + about + "\n\n" + head + "\n".join(rows)


def _data(info: dict[str, Any]) -> str:
    corpora = info.get("corpora")
    if not corpora:
        return ""
    head = "| corpus | split | share | sha256 |\n|---|---|---|---|\n"
    settings = info.get("config", {}).get("corpora", {})
    rows = []
    for corpus in corpora:
        weight = settings.get(corpus["name"], {}).get("weight")
        share = "by its rows" if weight is None else f"{weight:g}"
        rows.append(f"| {_cell(corpus['name'])} | {_cell(corpus['split'])} | {share} | `{corpus['digest']}` |")
    mix = info.get("config", {}).get("mix")
    mixed = "" if not mix or len(corpora) < 2 else "\n\nMixture: " + _inline(mix) + "."
    return "## Training data\n\n" + head + "\n".join(rows) + mixed


def _loss(info: dict[str, Any]) -> str:
    losses = info.get("loss")
    if not losses:
        return ""
    if "name" in losses:
        losses = {"loss": losses}
    papers = info.get("papers", {})
    lines = []
    for key, loss in losses.items():
        rest = {name: value for name, value in loss.items() if name != "name"}
        source = f" ({papers[key]})" if papers.get(key) else ""
        lines.append(f"- `{key}`: **{loss['name']}**{source}: {_inline(rest)}")
    if info.get("temperature") is not None:
        lines.append(f"\nTemperature at the end: {info['temperature']:.5g}.")
    return "## Loss\n\n" + "\n".join(lines)


def _settings(info: dict[str, Any]) -> str:
    settings = {key: value for key, value in info.get("config", {}).items() if key not in _SAID_ELSEWHERE}
    if not settings:
        return ""
    return "## Hyper-parameters\n\n" + _table([(key, _value(value)) for key, value in settings.items()])


def _metrics(info: dict[str, Any]) -> str:
    history = info.get("training")
    if not history:
        return ""
    last = history[-1]
    measured = {key: value for key, value in last.items() if "/" in key and not key.startswith("time/")}
    rows = [(key, _value(value)) for key, value in measured.items()]
    splits = info.get("evaluated", {})
    about = f"After step {last.get('step')}; loss {last.get('loss', float('nan')):.4g} on the last training batch."
    if splits:
        about += " " + " ".join(f"`{name}` is split `{split}`, held out." for name, split in splits.items())
    return "## Metrics\n\n" + about + ("\n\n" + _table(rows) if rows else "")


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _inline(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
