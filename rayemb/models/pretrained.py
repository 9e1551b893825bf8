"""Any encoder or decoder of the `transformers` library as a text tower; safetensors only, no code from outside."""

import inspect
import json
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from rayemb import storage
from rayemb.models.context import LongContext, first_position, trained_positions
from rayemb.models.errors import ModelError
from rayemb.models.packing import pack
from rayemb.models.tokenizer import PADDING
from rayemb.models.towers import TextTower, TextTowerConfig

# What networks of the library call the norm behind their last layer; those with norms after each part have none.
LAST_NORMS = ("norm", "final_norm", "final_layer_norm", "ln_f", "emb_layer_norm_after")
# Those that take any mask and any positions. Others look at tokens nearby (`sliding_window`) or count positions.
PACKS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "llama", "mistral", "qwen2", "qwen3")
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class PretrainedTextConfig(TextTowerConfig):
    """A network of the `transformers` library, its weights from a directory."""

    name: Literal["transformers"] = "transformers"
    source: str | None = Field(
        None, description="directory, path or URI, with config.json and safetensors; what is trained starts from it"
    )
    architecture: dict[str, Any] | None = Field(
        None, description="the network's config as in config.json; null: that of the source"
    )
    attention: Literal["own", "bidirectional"] = Field(
        "own", description="bidirectional: a decoder's tokens see those after them too (NV-Embed, KaLM)"
    )

    @model_validator(mode="after")
    def _resolved(self) -> "PretrainedTextConfig":
        if self.source is None and self.architecture is None:
            raise ValueError("give a source, or an architecture for random weights")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("architecture has no model_type")
        return self

    @property
    def network(self) -> dict[str, Any]:
        """The architecture, read from the source where it is not said. Raises ModelError if it cannot be."""
        return self.architecture or read_mapping(str(self.source), CONFIG)

    def cut(self, layers: int) -> "PretrainedTextConfig":
        """The same with its first so many layers alone."""
        network = self.network
        whole = network.get("num_hidden_layers")
        # What there is one of for each layer (`layer_types`) is cut with them.
        kept = {
            key: value[:layers] if isinstance(value, list) and len(value) == whole else value
            for key, value in network.items()
        }
        return self.model_copy(update={"architecture": {**kept, "num_hidden_layers": layers}})

    def build(self, vocab_size: int, max_length: int) -> TextTower:
        """The tower, with random weights.

        Raises ModelError for an architecture that is unknown, too small for the tokenizer's ids, or too short.
        """
        return PretrainedText(self, vocab_size, max_length)

    def load_weights(self, tower: TextTower) -> None:
        """Puts the source's weights into the tower. Raises ModelError if some are missing."""
        if self.source is not None and isinstance(tower, PretrainedText):
            tower.load(self.source)


class PretrainedText(TextTower):
    """Token ids through a network of `transformers`, without its head."""

    def __init__(self, config: PretrainedTextConfig, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.model = build_network(dict(config.network))
        settings = self.model.config
        self.features, self.layers = int(settings.hidden_size), int(settings.num_hidden_layers)
        if vocab_size > settings.vocab_size:
            raise ModelError(
                f"the tokenizer has {vocab_size} tokens and the network {settings.vocab_size}",
                where="model.text",
                fix="use the tokenizer of the network: model.tokenizer.name=pretrained",
            )
        self.longest, self._first_position = trained_positions(self.model, settings), first_position(self.model)
        self.context = None
        if config.context is not None:
            trained = config.context.trained or self.longest
            if trained is None:
                raise ModelError(
                    "nothing says how many positions it has", where="model.text.context", fix="give trained"
                )
            self.longest = trained
            self.context = LongContext(config.context, self.model, trained, max_length)
        elif self.longest is not None and max_length > self.longest:
            raise ModelError(
                f"texts of {max_length} tokens are asked for and the network has {self.longest} positions",
                where="model.tokenizer.max_length",
                fix=f"give at most {self.longest}, or model.text.context",
            )
        attentions = [module for module in self.model.modules() if hasattr(module, "is_causal")]
        self.causal = any(module.is_causal for module in attentions)
        if config.attention == "bidirectional" and self.causal:
            # Both: the mask is made by the config; where there is none, without padding, by the module's word.
            settings.is_causal = False
            for module in attentions:
                module.is_causal = False
            self.causal = False
        if config.attention_temperature != 1.0:
            _soften(self.model, config.attention_temperature)
        sliding = getattr(settings, "sliding_window", None) and getattr(settings, "use_sliding_window", True)
        self.packs = settings.model_type in PACKS and not sliding
        self._padding = settings.pad_token_id if settings.pad_token_id is not None else 0

    @property
    def embedding(self) -> nn.Embedding:
        """The vectors of its tokens."""
        found: nn.Embedding = self.model.get_input_embeddings()
        return found

    def finished(self, state_BLE: Tensor) -> Tensor:
        """The states behind the last norm, where the network has one."""
        for part in (self.model, getattr(self.model, "encoder", None)):
            for name in LAST_NORMS:
                if isinstance(getattr(part, name, None), nn.Module):
                    normed: Tensor = getattr(part, name)(state_BLE)
                    return normed
        return state_BLE

    def forward(self, ids_BL: Tensor, *, every_layer: bool = False) -> list[Tensor]:
        """States `(B, L, E)`; of every layer but the embeddings where they are asked for."""
        more = self.context.inputs(ids_BL) if self.context is not None else {}
        packed = pack(ids_BL) if self.packs and not more else None
        if packed is not None:
            more["position_ids"] = packed.positions + self._first_position
            ids, mask = packed.ids, packed.mask(causal=self.causal)
        else:
            ids, mask = ids_BL, (ids_BL != PADDING).long()
            if more and "token_type_ids" in inspect.signature(self.model.forward).parameters:
                # Left out, they come from a buffer that is as long as the positions.
                more["token_type_ids"] = torch.zeros_like(ids_BL)
        found = self.model(
            input_ids=ids.masked_fill(ids == PADDING, self._padding),
            attention_mask=mask,
            output_hidden_states=every_layer,
            **more,
        )
        states = list(found.hidden_states[1:]) if every_layer else [found.last_hidden_state]
        return states if packed is None else [packed.unpacked(state) for state in states]

    def load(self, source: str) -> None:
        """The weights of a directory. Raises ModelError if some are missing, naming them."""
        self.put(read_weights(source), source)

    def put(self, there: dict[str, Tensor], source: str) -> None:
        """Weights of `source`, with a head or without. Raises ModelError if some are missing, naming them."""
        prefix = f"{self.model.base_model_prefix}."
        there = there | {name.removeprefix(prefix): there[name] for name in list(there) if name.startswith(prefix)}
        wanted = self.model.state_dict()
        missing = sorted(set(wanted) - set(there))
        if missing:
            raise ModelError(f"{len(missing)} weights are missing, the first is {missing[0]}", where=source)
        wrong = [name for name in wanted if wanted[name].shape != there[name].shape]
        if wrong:
            shapes = f"{tuple(there[wrong[0]].shape)}, expected {tuple(wanted[wrong[0]].shape)}"
            raise ModelError(f"{wrong[0]} has the shape {shapes}", where=source)
        self.model.load_state_dict({name: there[name].to(wanted[name].dtype) for name in wanted})


def architecture_of(kind: str, architecture: dict[str, Any]) -> Any:
    """A config of `transformers` from the rest of a config.json; weights are fp32 whatever it says."""
    import transformers

    return transformers.AutoConfig.for_model(kind, **{**architecture, "dtype": None})


def build_network(architecture: dict[str, Any]) -> Any:
    """A network of `transformers` from the content of a config.json, with random weights; takes its model_type out."""
    import transformers

    kind = str(architecture.pop("model_type"))
    try:
        config = architecture_of(kind, architecture)
        family = transformers.AutoModelForTextEncoding if config.is_encoder_decoder else transformers.AutoModel
        model = family.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, ImportError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(
            f"transformers cannot build a {kind!r} as a text tower ({first})", where="model.text"
        ) from error
    model.config.use_cache = False
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # pooling is ours
    return model


def _soften(model: nn.Module, temperature: float) -> None:
    found = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), float)]
    if not found:
        raise ModelError(
            f"the attention of {type(model).__name__} has no scale that could be changed",
            where="model.text.attention_temperature",
            fix="leave it at 1",
        )
    for module in found:
        module.scaling = module.scaling / temperature  # type: ignore[assignment,operator]


def read_weights(source: str) -> dict[str, Tensor]:
    """The tensors of a directory's safetensors, in one file or several. Raises ModelError if there are none."""
    found: dict[str, Tensor] = {}
    for name in weight_files(source):
        if name == INDEX:
            continue
        try:
            found |= load_tensors(storage.read_bytes(storage.join(source, name)))
        except SafetensorError as error:
            raise ModelError(f"{name} is cut short or damaged ({error})", where=source) from error
    return found


def weight_files(source: str) -> list[str]:
    """The names of a directory's safetensors, behind their index if there are several. Raises ModelError if none."""
    if storage.exists(storage.join(source, WEIGHTS)):
        return [WEIGHTS]
    if not storage.exists(storage.join(source, INDEX)):
        raise ModelError(f"no {WEIGHTS} here (pickled weights are never loaded)", where=source)
    names = sorted(set(read_mapping(source, INDEX)["weight_map"].values()))
    for name in names:
        if "/" in name or "\\" in name:
            raise ModelError(f"{INDEX} names a file outside of the directory: {name!r}", where=source)
    return [INDEX, *names]


def read_mapping(source: str, name: str) -> dict[str, Any]:
    """The JSON mapping of a file in a directory. Raises ModelError if it cannot be read."""
    try:
        found = json.loads(storage.read_bytes(storage.join(source, name)))
    except storage.StorageError as error:
        raise ModelError(f"{name}: {error.what}", where=source) from error
    except ValueError as error:
        raise ModelError(f"{name} is not JSON", where=source) from error
    if not isinstance(found, dict):
        raise ModelError(f"{name} is not a mapping", where=source)
    return found
