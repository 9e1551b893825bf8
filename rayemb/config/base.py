"""Typed, frozen configs from YAML and `key=value` overrides."""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rayemb.errors import RayembError


class Config(BaseModel):
    """Base of every config: unknown keys are errors, values are frozen, fields document themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ConfigError(RayembError):
    """A config that does not validate; `problems` has one `(key, message)` per wrong key."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", problems: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(what, where=where, fix=fix)
        self.problems = list(problems)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.what, self.where, self.fix, self.problems)


def _rebuild(what: str, where: str, fix: str, problems: list[tuple[str, str]]) -> ConfigError:
    return ConfigError(what, where=where, fix=fix, problems=problems)


C = TypeVar("C", bound=Config)


def load(model: type[C], path: str | Path | None = None, overrides: Iterable[str] = ()) -> C:
    """The config of `model` from a YAML file and overrides `a.b.c=value` (values are YAML: `x=[1, 2]`, `x=null`).

    Raises ConfigError naming the file, or every wrong key with what was expected.
    """
    data: dict[str, Any] = {}
    source = str(path) if path else "defaults"
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the config ({error.strerror})", where=source) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", where=source) from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"expected a mapping at the top, got {type(loaded).__name__}", where=source)
        data = loaded or {}
    for override in overrides:
        _apply(data, override)
    return from_mapping(model, data, source=source)


def from_mapping(model: type[C], data: Mapping[str, Any], *, source: str = "config") -> C:
    """The validated config from a plain mapping. Raises ConfigError listing every wrong key."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [(_key(model, item["loc"]), _message(model, item)) for item in error.errors()]
        lines = "; ".join(f"{key}: {message}" for key, message in problems)
        raise ConfigError(lines, where=source, problems=problems) from error


def dump(config: Config) -> str:
    """The whole resolved config as YAML, ready to be loaded again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema(model: type[Config]) -> str:
    """The JSON schema of a config, for editors and validators."""
    return json.dumps(model.model_json_schema(), indent=2, ensure_ascii=False)


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise ConfigError("an override is written key.sub=value", where=repr(override))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value is not valid YAML: {text!r}", where=key) from error
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        child = data.get(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(parents[: depth + 1])} is not a mapping", where=override)
        # Copied: under a YAML alias the same dict may stand at another key too.
        data[parent] = data = dict(child)
    data[leaf] = value


def _key(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in _walk(model, loc)[1]) or "(top)"


def _message(model: type[BaseModel], item: Any) -> str:
    if item["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, item["loc"][:-1]))
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}" if known else ""
        return f"unknown key. {hint}".strip()
    message = str(item["msg"]).removeprefix("Value error, ")
    shown = item.get("input")
    if isinstance(shown, str | int | float | bool) or shown is None:
        return f"{message} (got {shown!r})" if item["type"] != "missing" else message
    return message


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Names of the fields that are valid at `loc`, as far as the schema tells (tagged unions included)."""
    root = model.model_json_schema()
    return {name for node in _expand(_walk(model, loc)[0], root) for name in node.get("properties", {})}


def _walk(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[dict[str, Any]], list[int | str]]:
    """The schema's nodes at `loc`, and `loc` without the tags of discriminated unions, which no key of a file is."""
    root = model.model_json_schema()
    nodes: list[dict[str, Any]] = [root]
    keys: list[int | str] = []
    for part in loc:
        following: list[dict[str, Any]] = []
        tag = False
        for node in _expand(nodes, root):
            if isinstance(part, str) and part in node.get("properties", {}):
                following.append(node["properties"][part])
            elif isinstance(part, int) and "items" in node:
                following.append(node["items"])
            elif any(field.get("const") == part for field in node.get("properties", {}).values()):
                following.append(node)
                tag = True
            elif isinstance(node.get("additionalProperties"), dict):
                following.append(node["additionalProperties"])
        nodes = following or nodes
        if not tag:
            keys.append(part)
    return nodes, keys


def _expand(nodes: list[dict[str, Any]], root: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if "$ref" in node:
            pending.append(root["$defs"][node["$ref"].rsplit("/", 1)[-1]])
            continue
        found.append(node)
        pending.extend(node.get("anyOf", []) + node.get("oneOf", []) + node.get("allOf", []))
    return found
