"""The text tower as a directory that sentence-transformers loads, without rayemb and without code from outside."""

import importlib.metadata
from collections.abc import Collection
from typing import Any

from torch import nn

from rayemb.models.bundle import Model
from rayemb.models.card import card
from rayemb.models.errors import ModelError
from rayemb.models.interchange.directory import Files, as_json, as_safetensors
from rayemb.models.interchange.tower import as_network
from rayemb.models.tokenizer import TextTokenizer

MAIN = "modules.json"
POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
# What tokenizers call their special tokens; any of them that is in the vocabulary is declared.
SPECIAL = {
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
}


def files(model: Model) -> Files:
    """The files of the directory. Raises ModelError for a model that sentence-transformers cannot express."""
    pooling = model.network.config.text.pooling.name
    if pooling not in POOLINGS:
        raise ModelError(
            f"sentence-transformers has no pooling {pooling!r} (it has {', '.join(POOLINGS)})",
            where="model.text.pooling",
            fix="export it as onnx, or train with one of those",
        )
    config, weights, padding = as_network(model.network, model.tokenizer)
    features, length = model.network.text.features, model.tokenizer.max_length
    special = _special(model.tokenizer, padding)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    found = {
        "config.json": as_json(config),
        "model.safetensors": as_safetensors(weights),
        "tokenizer.json": model.tokenizer.to_json().encode(),
        "tokenizer_config.json": as_json(_tokenizer_config(model.tokenizer, special)),
        "sentence_bert_config.json": as_json({"max_seq_length": length, "do_lower_case": False}),
        "config_sentence_transformers.json": as_json(_settings(model)),
        # The keys that every version reads; the path of a module's class likewise.
        "1_Pooling/config.json": as_json(
            {
                "word_embedding_dimension": features,
                **{f"pooling_mode_{mode}": mode == POOLINGS[pooling] for mode in MODES},
                "include_prompt": _pools_prompts(model, special.values()),
            }
        ),
    }
    projection = model.network.text_projection
    if isinstance(projection, nn.Linear):
        modules.append(("2_Dense", "Dense"))
        dense = {
            "in_features": features,
            "out_features": model.dim,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        found["2_Dense/config.json"] = as_json(dense)
        found["2_Dense/model.safetensors"] = as_safetensors({"linear.weight": projection.weight})
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    found[MAIN] = as_json(
        [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(modules)
        ]
    )
    found["README.md"] = card(
        model.facts, library="sentence-transformers", usage=_usage(model), notes=_notes(model)
    ).encode()
    return found


def _usage(model: Model) -> str:
    code = (
        "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer(".")  # this directory\n'
        f'texts = model.encode_document(["a red heart", "a blue star"])  # (2, {model.dim}) float32, unit rows\n'
        'queries = model.encode_query(["heart"])\n'
        "print(model.similarity(queries, texts))"
    )
    return f"```python\n{code}\n```"


def _notes(model: Model) -> str:
    if model.network.image is None:
        return ""
    return "This directory holds the text tower; the image tower is in the rayemb model it was exported from."


def _settings(model: Model) -> dict[str, Any]:
    prompts = model.network.config.prompts
    named = {"query": prompts.query, "document": prompts.text}
    return {
        "__version__": {name: importlib.metadata.version(name) for name in ("transformers", "torch")},
        "prompts": named if any(named.values()) else {},
        "default_prompt_name": "document" if prompts.text else None,
        "similarity_fn_name": "cosine",
    }


def _pools_prompts(model: Model, special: Collection[str]) -> bool:
    """Whether its Pooling is to include prompts. Raises ModelError if it would cut them off elsewhere than here."""
    prompts = model.network.config.prompts
    # The first token is taken here whatever is pooled; there it would be the first one behind the prompt.
    if prompts.pooled or model.network.config.text.pooling.name == "cls":
        return True
    for prompt in filter(None, (prompts.query, prompts.text)):
        alone = [int(token) for token in model.tokenizer([prompt])[0]]
        theirs = len(alone) - (model.tokenizer.tokenizer.id_to_token(alone[-1]) in special)
        ours = int(model.tokenizer.with_prompt(["a"], prompt)[1][0])
        if theirs != ours:
            raise ModelError(
                f"the prompt {prompt[:40]!r} is {ours} tokens before a text and {theirs} alone, which is how many "
                "sentence-transformers would leave out of the pooling",
                where="model.prompts",
                fix="a prompt that ends with a whole token (a line break, a colon), or pooled: true",
            )
    return False


def _special(tokenizer: TextTokenizer, padding: int) -> dict[str, str]:
    inner = tokenizer.tokenizer
    special = {"pad_token": str(inner.id_to_token(padding))}
    for role, tokens in SPECIAL.items():
        known = next((token for token in tokens if inner.token_to_id(token) is not None), None)
        if known is not None:
            special[role] = known
    return special


def _tokenizer_config(tokenizer: TextTokenizer, special: dict[str, str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.max_length,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        # As here: a text that says "[PAD]" is text.
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
