"""The catalog: which collections there are, their versions, and which of these answers."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from rayemb.config import Config

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# Switches that are remembered of each collection.
_HISTORY = 100

Name = Annotated[str, StringConstraints(pattern=NAME)]
Action = Literal["add", "promote", "canary", "shadow", "rollback", "remove"]


class GateConfig(Config):
    """How good a version has to be."""

    min_recall: float = Field(
        0.9, ge=0, le=1, description="least recall of the index against exact search, of its manifest; 0: not asked for"
    )
    k: int = Field(10, ge=1, description="hits of a labelled query among which a relevant item counts")
    margin: float = Field(
        0.02, ge=0, le=1, description="how much fewer labelled queries may be answered than by the live version"
    )
    require: tuple[str, ...] = Field(
        (),
        description="what labelled queries must show besides, as ndcg@10>=0.4, low(recall@10)>=0.5 or "
        "low(gain(mrr@10))>=0 on the live version; recall, success (any is found), precision, ndcg, map, mrr, each @k",
    )

    @field_validator("require")
    @classmethod
    def _are_requirements(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        checked(value)
        return value


def checked(texts: Sequence[str]) -> None:
    """Raises EvaluateError, a ValueError, naming the text that is no requirement for `GateConfig.require`."""
    if texts:
        # Whoever reads a catalog, or is a client, need not import what judges.
        from rayemb.serve.versions.requirements import requirements

        requirements(texts)


class QueryMapRef(Config):
    """A map of query vectors into the space of another model's index: `rayemb.serve.versions.query_map`."""

    uri: str = Field(description="a safetensors file")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="digest of that file")


class Version(Config):
    """A model and an index that belong together, as they were when they were added."""

    model: str = Field(description="URI of the model directory")
    model_digest: str = Field(description="the model's digest then; another one is refused")
    index: str = Field(description="URI of the index")
    index_version: str = Field(
        description="the index's version then; another one is refused, unless compactions made it from that one"
    )
    dim: int = Field(ge=1, description="dimension of the index's vectors")
    rows: int = Field(ge=1, description="items in the index")
    added: str = Field(description="when, ISO 8601")
    query_map: QueryMapRef | None = Field(None, description="where the index is of another model than `model`")
    labels: str | None = Field(
        None, description="labelled queries that promotion judges by: lines of JSON, {text, relevant: [id, ...]}"
    )


class Canary(Config):
    """A second version, and how much of the requests it gets."""

    version: Name
    percent: float = Field(ge=0, le=100, description="share of the requests, in percent")


class Event(Config):
    """One change, for people and for rolling back."""

    at: str = Field(description="when, ISO 8601")
    action: Action
    version: str = Field(description="the version that it was about")
    before: str | None = Field(None, description="the live version before, where that changed")
    forced: str | None = Field(None, description="what the gate would have refused, where it was overruled")
    figures: dict[str, float] = Field(default_factory=dict, description="what the gate measured")


class Collection(Config):
    """Versions side by side; `live` answers, a canary answers some, a shadow is asked beside."""

    versions: dict[Name, Version] = Field(default_factory=dict)
    live: Name | None = Field(None, description="the version that answers; null: none yet")
    canary: Canary | None = None
    shadow: Canary | None = None
    history: tuple[Event, ...] = Field((), description="changes, the latest last")

    @model_validator(mode="after")
    def _names_are_known(self) -> "Collection":
        for role, name in self.roles.items():
            if name not in self.versions:
                raise ValueError(f"{role} names version {name!r}, which is not there")
        if self.live is None and (self.canary or self.shadow):
            raise ValueError("a canary and a shadow stand beside a live version, and there is none")
        return self

    @property
    def roles(self) -> dict[str, str]:
        """The versions that are in use, by what they do."""
        beside = {"canary": self.canary, "shadow": self.shadow}
        live = {"live": self.live} if self.live is not None else {}
        return {**live, **{role: each.version for role, each in beside.items() if each}}

    def with_event(self, event: Event, **changes: object) -> "Collection":
        """This collection changed, and the change remembered."""
        kept = (*self.history, event)[-_HISTORY:]
        return Collection.model_validate({**dict(self), **changes, "history": kept})


class Catalog(Config):
    """The whole document, as JSON at one URI."""

    format: Literal[1] = 1
    revision: int = Field(0, ge=0, description="counts the changes")
    collections: dict[Name, Collection] = Field(default_factory=dict)

    def with_collection(self, name: str, collection: Collection) -> "Catalog":
        """This catalog with that collection in the place of what had the name."""
        return Catalog(revision=self.revision, collections={**self.collections, name: collection})


def is_name(text: str) -> bool:
    """Whether a collection or a version may be called so."""
    return re.match(NAME, text) is not None
