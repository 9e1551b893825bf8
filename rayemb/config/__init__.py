"""The machinery of configuration: YAML in, overrides `a.b=c`, errors that name the key, JSON schema out.

Each room's own config models live in that room; this one knows none of them.
"""

from rayemb.config.base import Config, ConfigError, dump, from_mapping, load, schema

__all__ = ["Config", "ConfigError", "dump", "from_mapping", "load", "schema"]
