"""A text tower as a network of the `transformers` library: its config.json and its weights."""

import json
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from rayemb.models.errors import ModelError
from rayemb.models.pretrained import PretrainedText, build_network
from rayemb.models.text import TextTransformer
from rayemb.models.tokenizer import PADDING, TextTokenizer
from rayemb.models.towers import TextTower
from rayemb.models.two_tower import TwoTower

PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
Tensors = dict[str, Tensor]


def as_network(network: TwoTower, tokenizer: TextTokenizer) -> tuple[dict[str, Any], Tensors, int]:
    """The config, the weights and the id for padding of the text tower as `transformers` would have it.

    Raises ModelError for one that no network of that library equals.
    """
    tower, temperature = network.text, network.config.text.attention_temperature
    if isinstance(tower, PretrainedText):
        config, weights, padding = _of_pretrained(tower, temperature)
    elif isinstance(tower, TextTransformer):
        padding = _padding(tokenizer)
        make = _as_clip if tower.causal else _as_esm
        config, weights = make(tower, padding)
    else:
        raise ModelError(f"{type(tower).__name__} has no counterpart in transformers", where="model.text")
    _check(tower, config, weights, padding)
    return config, weights, padding


def _of_pretrained(tower: PretrainedText, temperature: float) -> tuple[dict[str, Any], Tensors, int]:
    model = tower.model
    weights = dict(model.state_dict())
    if temperature != 1.0:
        for name, module in model.named_modules():
            if isinstance(getattr(module, "scaling", None), float):
                weights |= _sharpened(name, module, temperature)
    config = json.loads(model.config.to_json_string())
    config = {**config, "architectures": [type(model).__name__], "dtype": "float32"}
    padding = model.config.pad_token_id
    return config, weights, 0 if padding is None else int(padding)


def _sharpened(name: str, module: Any, temperature: float) -> Tensors:
    """The query weights of one attention, with the temperature in them."""
    found = next((key for key in ("q_proj", "query", "q_lin") if hasattr(module, key)), None)
    if found is None or hasattr(module, "q_norm"):
        raise ModelError(
            f"the attention temperature cannot be put into the weights of {type(module).__name__}",
            where="model.text.attention_temperature",
            fix="export it as onnx",
        )
    query = getattr(module, found)
    return {f"{name}.{found}.{key}": value / temperature for key, value in query.state_dict().items()}


def _blocks(tower: TextTransformer) -> list[Tensors]:
    """Weights and biases of each block under plain names, queries, keys and values apart."""
    found: list[Tensors] = []
    for block in cast(Iterable[Any], tower.blocks):
        state = block.state_dict()
        # The scale of scaled_dot_product_attention there is always that of the head: the rest goes into the queries.
        own = block.scale * (tower.features // block.heads) ** 0.5
        named: Tensors = {}
        for kind in ("weight", "bias"):
            q, k, v = state.pop(f"qkv.{kind}").chunk(3)
            named |= {f"query.{kind}": q * own, f"key.{kind}": k, f"value.{kind}": v}
        found.append({**state, **named})
    return found


def _as_esm(tower: TextTransformer, padding: int) -> tuple[dict[str, Any], Tensors]:
    """ESM (Rives et al., 2021) with absolute positions: pre-norm, attention both ways, the exact GELU, a last norm.

    SigLIP's text model is the same network, but `AutoModel` does not know it alone.
    """
    positions, width = tower.positions, tower.features
    first: Any = tower.blocks[0]
    heads = int(first.heads)
    config = {
        "architectures": ["EsmModel"],
        "model_type": "esm",
        "dtype": "float32",
        "vocab_size": tower.tokens.num_embeddings,
        "hidden_size": width,
        "intermediate_size": first.up.out_features,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": heads,
        # Positions are counted from the one after the id of padding.
        "max_position_embeddings": positions.shape[0] + padding + 1,
        "position_embedding_type": "absolute",
        "layer_norm_eps": tower.norm.eps,
        "emb_layer_norm_before": False,
        "token_dropout": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": padding,
        "mask_token_id": padding,
        "is_folding_model": False,
        "use_cache": False,
    }
    weights = {
        "embeddings.word_embeddings.weight": tower.tokens.weight,
        "embeddings.position_embeddings.weight": torch.cat([positions.new_zeros(padding + 1, width), positions]),
        # The library builds these two for every ESM; nothing here reads them.
        "pooler.dense.weight": positions.new_zeros(width, width),
        "pooler.dense.bias": positions.new_zeros(width),
        "contact_head.regression.weight": positions.new_zeros(1, tower.layers * heads),
        "contact_head.regression.bias": positions.new_zeros(1),
        **{f"encoder.emb_layer_norm_after.{key}": value for key, value in tower.norm.state_dict().items()},
    }
    parts = {
        "norm_attention": "attention.LayerNorm",
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "norm_mlp": "LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
    }
    return config, weights | _renamed(_blocks(tower), "encoder.layer", parts)


def _as_clip(tower: TextTransformer, padding: int) -> tuple[dict[str, Any], Tensors]:
    """The text model of CLIP (Radford et al., 2021): the same with causal attention."""
    first: Any = tower.blocks[0]
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "dtype": "float32",
        "vocab_size": tower.tokens.num_embeddings,
        "hidden_size": tower.features,
        "intermediate_size": first.up.out_features,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": first.heads,
        "max_position_embeddings": tower.positions.shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": tower.norm.eps,
        "attention_dropout": 0.0,
        "pad_token_id": padding,
        "bos_token_id": padding,
        "eos_token_id": 2,
        "projection_dim": tower.features,
        "use_cache": False,
    }
    weights = {
        "embeddings.token_embedding.weight": tower.tokens.weight,
        "embeddings.position_embedding.weight": tower.positions,
        **{f"final_layer_norm.{key}": value for key, value in tower.norm.state_dict().items()},
    }
    parts = {
        "norm_attention": "layer_norm1",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "norm_mlp": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    weights |= _renamed(_blocks(tower), "encoder.layers", parts)
    return config, {f"text_model.{name}": value for name, value in weights.items()}


def _renamed(blocks: list[Tensors], prefix: str, parts: dict[str, str]) -> Tensors:
    renamed = {}
    for number, block in enumerate(blocks):
        for name, value in block.items():
            part, kind = name.rsplit(".", 1)
            renamed[f"{prefix}.{number}.{parts[part]}.{kind}"] = value
    return renamed


def _padding(tokenizer: TextTokenizer) -> int:
    for token in PAD_TOKENS:
        if (found := tokenizer.tokenizer.token_to_id(token)) is not None:
            return int(found)
    raise ModelError(
        f"the tokenizer has no token for padding (none of {', '.join(PAD_TOKENS)})",
        where="model.tokenizer",
        fix="export it as onnx, where padding is what the attention mask says",
    )


def _check(tower: TextTower, config: dict[str, Any], weights: Tensors, padding: int) -> None:
    """Raises ModelError if the network that `transformers` builds of it has other states than the tower."""
    other = build_network(dict(config))
    own = other.state_dict()
    named = {name if name in own else name.removeprefix("text_model."): value.cpu() for name, value in weights.items()}
    missing = set(own) - set(named)
    if missing:
        raise ModelError(f"transformers wants weights that the tower does not have: {sorted(missing)[0]}")
    other.load_state_dict({name: named[name] for name in own})
    other.eval()
    generator = torch.Generator().manual_seed(0)
    length = min(6, tower.positions.shape[0]) if isinstance(tower, TextTransformer) else 6
    high = int(config["vocab_size"])
    ids = torch.randint(0, high, (3, length), generator=generator)
    ids = torch.where(ids == padding, (ids + 1) % high, ids)
    device = next(tower.parameters()).device
    for cut in (0, 2):  # without padding and with it: libraries take different ways
        batch = ids.clone()
        if cut:
            batch[1:, -cut:] = PADDING
        real = batch != PADDING
        with torch.inference_mode():
            mine = tower(batch.to(device))[0].float().cpu()
            theirs = other(input_ids=batch.masked_fill(~real, padding), attention_mask=real.long()).last_hidden_state
        off = float((mine - theirs.float())[real].abs().max())
        if not off < 1e-3 * max(1.0, float(mine[real].abs().max())):
            raise ModelError(
                f"transformers computes other states from the exported {config['model_type']} (off by {off:.2g}): what "
                "was changed in its attention is not in its config",
                where="model.text",
                fix="export it as onnx",
            )
