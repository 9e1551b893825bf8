"""Every curation step as a verb of the command line: its help, and a run's config with that step alone."""

import json
import typing
from collections.abc import Iterable

import yaml
from pydantic_core import PydanticUndefined

from rayemb.config import ConfigError
from rayemb.curate import AnyStep, Step


def steps() -> dict[str, type[Step]]:
    """The steps by name."""
    union = typing.get_args(typing.get_args(AnyStep)[0])
    return {config.model_fields["name"].default: config for config in union}


def step_help(step: type[Step]) -> str:
    """What the step does, then a paragraph for each setting: name, type, default, description."""
    paragraphs = [" ".join(part.split()) for part in (step.__doc__ or "").split("\n\n")]
    properties = step.model_json_schema()["properties"]
    for name, field in step.model_fields.items():
        if name == "name":
            continue
        default = "needed" if field.is_required() else f"default {_default(field)!r}"
        description = f": {field.description}" if field.description else ""
        paragraphs.append(f"{name} ({_type(properties[name])}, {default}){description}")
    return "\n\n".join(paragraphs)


def step_overrides(step: type[Step], args: Iterable[str]) -> list[str]:
    """The arguments with the step's own settings put under `curate.steps`; the others mean the run's config.

    `min_words=2 workspace=here` becomes `curate.steps=[{"name": ..., "min_words": 2}] workspace=here`.
    """
    own: dict[str, typing.Any] = {"name": step.model_fields["name"].default}
    others = []
    for arg in args:
        key, separator, text = arg.partition("=")
        *parents, leaf = key.split(".")
        if not separator or [*parents, leaf][0] not in step.model_fields:
            others.append(arg)
            continue
        at = own
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{parent} has a value already", where=arg)
        try:
            at[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value is not valid YAML: {text!r}", where=key) from error
    return [*others, f"curate.steps={json.dumps([own], default=str)}"]


def _default(field: typing.Any) -> object:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return None
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _type(schema: dict[str, typing.Any]) -> str:
    """A JSON schema's type in a word or two."""
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "$ref" in schema or "oneOf" in schema:
        return "settings"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))
