"""The towers as ONNX files, compared with the model by onnxruntime before they are written."""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayemb.models.bundle import Model
from rayemb.models.card import card
from rayemb.models.errors import ModelError
from rayemb.models.interchange.directory import Files, as_json, parameters
from rayemb.models.tokenizer import PADDING
from rayemb.models.two_tower import TwoTower

MAIN = "config.json"
TEXT, IMAGE = "text.onnx", "image.onnx"
TEXT_OUTPUT, IMAGE_OUTPUT = "sentence_embedding", "image_embedding"
# One file of protobuf holds 2 GB; beyond a margin the weights lie beside it.
INLINE_PARAMETERS = 400_000_000
CLOSE = 1e-5
LENGTHS = ((1, 1), (2, None), (5, 3))  # rows and tokens of the comparison; None: the most


class _Text(nn.Module):
    def __init__(self, network: TwoTower) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prompt_length: Tensor | None = None) -> Tensor:
        return self.network.encode_text(input_ids.masked_fill(attention_mask == 0, PADDING), prompt_length)


class _Image(nn.Module):
    def __init__(self, network: TwoTower) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.network.encode_image(pixel_values)


def files(model: Model) -> Files:
    """Both towers, the tokenizer and a README.

    Raises ModelError without the packages it needs, or if onnxruntime computes other vectors.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"{error.name} is not installed", where="--format onnx", fix="pip install 'rayemb[onnx]'"
        ) from error
    prompts = model.network.config.prompts
    skips = not prompts.pooled and bool(prompts.query or prompts.text)
    found = _graph(_Text(model.network), TEXT, TEXT_OUTPUT, [_texts(model, *shape, skips=skips) for shape in LENGTHS])
    towers: dict[str, Any] = {"text": {"file": TEXT, "inputs": ["input_ids", "attention_mask"], "output": TEXT_OUTPUT}}
    if skips:
        towers["text"]["inputs"].append("prompt_length")
    if model.network.image is not None:
        found |= _graph(_Image(model.network), IMAGE, IMAGE_OUTPUT, [_images(model, rows) for rows in (1, 2, 5)])
        towers["image"] = {"file": IMAGE, "inputs": ["pixel_values"], "output": IMAGE_OUTPUT}
    config = {
        "digest": model.digest,
        "dim": model.dim,
        "max_length": model.tokenizer.max_length,
        "image_size": model.network.config.image_size,
        "prompts": prompts.model_dump(mode="json"),
        "files": towers,
    }
    return {
        **found,
        "tokenizer.json": model.tokenizer.to_json().encode(),
        "README.md": card(model.facts, library="onnx", usage=_usage(model, skips=skips)).encode(),
        MAIN: as_json(config),
    }


def _texts(model: Model, rows: int, length: int | None, *, skips: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    size = (rows, length or model.tokenizer.max_length)
    ids = torch.randint(0, model.tokenizer.vocab_size, size, generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, 2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "prompt_length": torch.arange(rows) % 2} if skips else inputs


def _images(model: Model, rows: int) -> dict[str, Tensor]:
    side = model.network.config.image_size
    generator = torch.Generator().manual_seed(rows)
    return {"pixel_values": torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)}


def _graph(module: nn.Module, name: str, output: str, samples: list[dict[str, Tensor]]) -> Files:
    """The file of one tower, and of its weights if they are too many for one."""
    example = samples[1]
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        key: {0: dynamic} if key in ("pixel_values", "prompt_length") else {0: dynamic, 1: dynamic} for key in example
    }
    module.eval()
    weights = dict(module.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(example.values()),
                dynamo=True,
                input_names=list(example),
                output_names=[output],
                dynamic_shapes=shapes,
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=parameters(weights) > INLINE_PARAMETERS)
        _compare(module, path, samples)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _compare(module: nn.Module, path: Path, samples: list[dict[str, Tensor]]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    for sample in samples:
        with torch.inference_mode():
            mine = module(**sample).numpy()
        (theirs,) = session.run(None, {key: value.numpy() for key, value in sample.items()})
        off = float(np.abs(mine - theirs).max())
        if not off <= CLOSE:
            shape = tuple(next(iter(sample.values())).shape)
            raise ModelError(f"onnxruntime is off by {off:.2g} on a batch of shape {shape}", where=path.name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _usage(model: Model, *, skips: bool) -> str:
    prompts = model.network.config.prompts
    lines = [
        "import json",
        "import numpy as np",
        "import onnxruntime",
        "from tokenizers import Tokenizer",
        "",
        'tokenizer = Tokenizer.from_file("tokenizer.json")  # cuts texts that are too long',
        "tokenizer.enable_padding()",
        "tokenizer.encode_special_tokens = True  # a text that says [PAD] is text",
    ]
    if prompts.text or prompts.query:
        lines.append('prompt = json.load(open("config.json"))["prompts"]["text"]  # "query" for what is searched with')
    before = "prompt + " if prompts.text or prompts.query else ""
    lines += [
        f'rows = tokenizer.encode_batch([{before}text for text in ["a red heart", "a blue star"]])',
        "inputs = {",
        '    "input_ids": np.array([row.ids for row in rows], dtype=np.int64),',
        '    "attention_mask": np.array([row.attention_mask for row in rows], dtype=np.int64),',
    ]
    if skips:
        ends = "next((i for i, (_, end) in enumerate(row.offsets) if end > len(prompt)), len(row.ids))"
        lines.append(f'    "prompt_length": np.array([{ends} if prompt else 0 for row in rows], dtype=np.int64),')
    lines += ["}", f'texts = onnxruntime.InferenceSession("{TEXT}").run(None, inputs)[0]  # (2, {model.dim}) unit rows']
    about = f"`{TEXT}`: `input_ids` and `attention_mask` (batch, length) int64 to `{TEXT_OUTPUT}` (batch, {model.dim})"
    if skips:
        about += "; `prompt_length` (batch) int64: leading tokens that are read but not pooled"
    if model.network.image is not None:
        side = model.network.config.image_size
        lines += [
            f"pixels = np.zeros((1, 3, {side}, {side}), dtype=np.uint8)  # RGB, 0 to 255",
            f'images = onnxruntime.InferenceSession("{IMAGE}").run(None, {{"pixel_values": pixels}})[0]',
        ]
        about += (
            f". `{IMAGE}`: `pixel_values` (batch, 3, {side}, {side}) uint8, red, green, blue from 0 to 255, to "
            f"`{IMAGE_OUTPUT}` (batch, {model.dim}); pictures are fitted into the square as "
            "`rayemb.models.image_tensor` does"
        )
    if "json.load" not in "\n".join(lines):
        lines.remove("import json")
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n\n{about}. Any batch size, any length up to {model.tokenizer.max_length}."
