"""What directories of others hold: their modules, poolings, prompts, tokenizers and weights."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import normalizers
from torch import Tensor

from rayemb import storage
from rayemb.models.errors import ModelError
from rayemb.models.pretrained import INDEX, WEIGHTS, read_mapping, read_weights
from rayemb.models.tokenizer import TextTokenizer

PICKLE = "pytorch_model.bin"
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
LONGEST = 512  # where nothing says how long a text may be


@dataclass(frozen=True)
class Found:
    """What a directory of sentence-transformers or transformers says of itself."""

    network: str  # the directory of the network
    pooling: str
    projection: Tensor | None
    prompts: dict[str, Any]
    max_length: int | None
    lower_case: bool
    other_prompts: dict[str, str]


def of_transformers(source: str, pooling: str) -> Found:
    """A plain directory of `transformers`: no more than a network and its tokenizer."""
    return Found(source, pooling, None, {}, None, False, {})


def of_sentence_transformers(source: str) -> Found:
    """The modules of a directory. Raises ModelError, naming it, for one that rayemb does not have."""
    modules = storage.read_json(storage.join(source, "modules.json"))
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError("it is not a list of modules", where=storage.join(source, "modules.json"))
    names = [_module(module, source) for module in modules]
    places = [storage.join(source, module["path"]) if module.get("path") else source for module in modules]
    rest = [name for name in ("Dense", "Normalize") if name in names]
    if names != ["Transformer", "Pooling", *rest]:
        raise ModelError(
            f"the modules are {', '.join(names)}; rayemb has Transformer, Pooling, then Dense and Normalize at most",
            where=storage.join(source, "modules.json"),
        )
    settings = _optional(source, "config_sentence_transformers.json")
    if "Normalize" not in names and settings.get("similarity_fn_name") not in (None, "cosine"):
        raise ModelError(
            f"its vectors are not normalised and compared by {settings['similarity_fn_name']}; rayemb has unit vectors",
            where=storage.join(source, "modules.json"),
        )
    max_length, lower_case = _transformer(places[0])
    pooling, include = _pooling(places[1])
    prompts = dict(settings.get("prompts") or {})
    text = next((name for name in ("document", "passage", "corpus") if prompts.get(name)), "document")
    known = {"query": prompts.pop("query", None) or "", "text": prompts.pop(text, None) or "", "pooled": include}
    projection = _dense(places[2]) if "Dense" in names else None
    others = {name: prompt for name, prompt in prompts.items() if prompt}
    return Found(places[0], pooling, projection, known, max_length, lower_case, others)


def _module(module: dict[str, Any], source: str) -> str:
    kind = str(module.get("type", ""))
    if not kind.startswith("sentence_transformers."):
        raise ModelError(
            f"the module {kind!r} is code of its own, and code from outside is never run",
            where=storage.join(source, "modules.json"),
        )
    return kind.rsplit(".", 1)[-1]


def _transformer(place: str) -> tuple[int | None, bool]:
    """The longest text, and whether texts are put in lower case first."""
    settings = _optional(place, "sentence_bert_config.json")
    known = {"max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"}
    if odd := [key for key, value in settings.items() if key not in known and value]:
        raise ModelError(f"the setting {odd[0]!r} is not known", where=storage.join(place, "sentence_bert_config.json"))
    task = settings.get("transformer_task", "feature-extraction")
    kinds = list(settings.get("modality_config") or ["text"])
    if task != "feature-extraction" or kinds != ["text"]:
        raise ModelError(
            f"it is for {task} of {', '.join(map(str, kinds))}; texts alone can be imported",
            where=storage.join(place, "sentence_bert_config.json"),
        )
    return settings.get("max_seq_length"), bool(settings.get("do_lower_case"))


def _pooling(place: str) -> tuple[str, bool]:
    settings = read_mapping(place, "config.json")
    modes = settings.get("pooling_mode") or [mode for key, mode in LEGACY.items() if settings.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ModelError(
            f"the pooling is {' and '.join(modes)}; one of {', '.join(POOLINGS)} can be imported",
            where=storage.join(place, "config.json"),
        )
    return POOLINGS[modes[0]], bool(settings.get("include_prompt", True))


def _dense(place: str) -> Tensor:
    settings = read_mapping(place, "config.json")
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    problem = ""
    if activation != "Identity":
        problem = f"the activation {activation}"
    elif settings.get("use_residual"):
        problem = "a residual"
    elif settings.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        problem = f"the input {settings['module_input_name']}"
    weights = {} if problem else read_weights(place)
    if not problem and "linear.weight" not in weights:
        problem = "no linear.weight"
    elif not problem and "linear.bias" in weights and bool(weights["linear.bias"].any()):
        problem = "a bias"
    if problem:
        raise ModelError(
            f"Dense has {problem}; a plain matrix can be imported", where=storage.join(place, "config.json")
        )
    return weights["linear.weight"]


def tokenizer_of(found: Found, max_length: int) -> TextTokenizer:
    """The tokenizer as `transformers` makes it of the directory. Raises ModelError if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if storage.exists(storage.join(found.network, name)):
                (Path(folder) / name).write_bytes(storage.read_bytes(storage.join(found.network, name)))
        import transformers

        try:
            made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            inner = made.backend_tokenizer
        except Exception as error:  # whatever the library's many tokenizers raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"transformers cannot make its tokenizer ({first})", where=found.network) from error
    if found.lower_case and "Lowercase" not in repr(inner.normalizer):
        own = [inner.normalizer] if inner.normalizer is not None else []
        inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return TextTokenizer.from_json(inner.to_str(), max_length)


def length_of(found: Found, architecture: dict[str, Any]) -> int:
    """The tokens of a text at most: what the directory says, within the positions of the network."""
    said = found.max_length or _optional(found.network, "tokenizer_config.json").get("model_max_length")
    positions = architecture.get("max_position_embeddings")
    # Where nobody knows, transformers writes a number of thirty digits.
    length = int(said) if said and int(said) < 1_000_000 else LONGEST
    return min(length, int(positions)) if positions else length


def weights_of(source: str, *, allow_pickle: bool) -> tuple[dict[str, Tensor], str]:
    """The network's tensors and the sha256 of their file (of the first, of several).

    Raises ModelError without safetensors, unless pickles are allowed; those are read as plain tensors alone.
    """
    for name in (WEIGHTS, INDEX):
        if storage.exists(storage.join(source, name)):
            return read_weights(source), storage.sha256_file(storage.join(source, name))
    place = storage.join(source, PICKLE)
    if not storage.exists(place):
        raise ModelError(f"no {WEIGHTS} here", where=source)
    if not allow_pickle:
        raise ModelError(
            f"its weights are a pickle ({PICKLE}), which can run code when it is opened",
            where=source,
            fix="save them as safetensors, or give --allow-pickle, which reads plain tensors alone",
        )
    try:
        found = torch.load(storage.local_path(place), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever it comes upon
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{PICKLE} is not a mapping of plain tensors ({first})", where=source) from error
    return {name: value for name, value in found.items() if torch.is_tensor(value)}, storage.sha256_file(place)


def license_of(source: str) -> str | None:
    """The licence that the directory's README declares."""
    try:
        text = storage.read_bytes(storage.join(source, "README.md")).decode()
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (storage.StorageError, ValueError, IndexError, yaml.YAMLError):
        return None
    found = head.get("license") if isinstance(head, dict) else None
    return found if isinstance(found, str) else None


def _optional(place: str, name: str) -> dict[str, Any]:
    return read_mapping(place, name) if storage.exists(storage.join(place, name)) else {}
