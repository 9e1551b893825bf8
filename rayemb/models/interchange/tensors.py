"""The weights alone: one safetensors file of both towers, and what each tensor is."""

from typing import Any

from torch import nn

from rayemb.models.bundle import Model
from rayemb.models.card import card
from rayemb.models.interchange.directory import Files, as_json, as_safetensors

MAIN = "config.json"
PARTS = {
    "text": "text tower",
    "text_pooling": "from the states of a text's tokens to one vector",
    "text_projection": "from the text tower's features to the shared space, without a bias",
    "image": "image tower",
    "image_projection": "from the image tower's features to the shared space, without a bias",
}


def files(model: Model) -> Files:
    """Weights, tokenizer, and a config.json that says what the tensors are."""
    weights = model.network.state_dict()
    modules = dict(model.network.named_modules())
    config = {
        "towers": model.network.config.model_dump(mode="json"),
        "digest": model.digest,
        "parts": {name: about for name, about in PARTS.items() if any(key.startswith(f"{name}.") for key in weights)},
        "tensors": {
            name: {
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                **_owner(name, modules),
            }
            for name, value in weights.items()
        },
        "vectors": "a tower's features, pooled, times the projection's transpose, divided by their norm",
        "pixels": "(value / 255 - 0.5) / 0.5, channels red, green, blue first",
    }
    usage = (
        "```python\nfrom safetensors import safe_open\n\n"
        'with safe_open("model.safetensors", framework="np") as file:\n'
        "    for name in file.keys():\n        print(name, file.get_slice(name).get_shape())\n```\n\n"
        "`config.json` says what each tensor is."
    )
    return {
        "model.safetensors": as_safetensors(weights),
        "tokenizer.json": model.tokenizer.to_json().encode(),
        MAIN: as_json(config),
        "README.md": card(model.facts, library="safetensors", usage=usage).encode(),
    }


def _owner(name: str, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """The kind of module that a tensor is a parameter of."""
    return {"module": type(modules[name.rpartition(".")[0]]).__name__}
