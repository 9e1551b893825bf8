"""A recipe's steps, each with a config of its own: whatever can be wrong is said before a cluster starts."""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from rayemb.config import ConfigError, from_mapping
from rayemb.errors import RayembError
from rayemb.pipeline.config import ArtefactName, ReadName, RunConfig, StepConfig
from rayemb.pipeline.stages import STAGES, Stage
from rayemb.storage import join, normalise
from rayemb.train.soup import judged_on

# What an artefact is to those who read it.
_AS: dict[ArtefactName, ReadName] = {
    "corpus": "corpus",
    "curated": "corpus",
    "mined": "corpus",
    "model": "model",
    "soup": "model",
    "embeddings": "embeddings",
    "index": "index",
}
_SECTIONS = tuple(dict.fromkeys(section for stage in STAGES.values() for section in stage.sections))
_CHOICES = ("name", "kind")  # keys by which a mapping says what it is


@dataclass(frozen=True)
class PlannedStep:
    """A step as it is run: its config, and what it reads, `label: (artefact, URI)`."""

    name: str
    run: str
    config: RunConfig
    inputs: Mapping[str, tuple[ReadName, str]]

    @property
    def stage(self) -> Stage:
        """The stage that it runs."""
        return STAGES[self.run]


def plan(config: RunConfig) -> list[PlannedStep]:
    """The steps in order, each with its artefacts below `workspace/name` and the paths of what it reads.

    Raises ConfigError with every wrong key: `steps[3].train.loss.temprature`.
    """
    if not config.steps:
        raise ConfigError("there are no steps", where="steps", fix="see jobs/configs/recipe.yaml")
    planner = _Planner(config)
    steps = [planner.step(number, step) for number, step in enumerate(config.steps)]
    if planner.problems:
        lines = "; ".join(f"{key}: {message}" for key, message in planner.problems)
        raise ConfigError(lines, where="recipe", problems=planner.problems)
    return [step for step in steps if step]


class _Planner:
    """Goes through the steps and remembers what each one makes; what is wrong is gathered in `problems`."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.problems: list[tuple[str, str]] = []
        # As the user said it: what is not said must not hide a step's choice of another loss, say.
        said = config.model_dump(mode="json", exclude_unset=True)
        self.common = {key: value for key, value in said.items() if key in _SECTIONS}
        self.made: dict[str, tuple[ReadName | None, str] | None] = {}
        self.names = [step.name for step in config.steps]
        for name in sorted(config.artefacts.model_fields_set - set(get_args(ReadName))):
            self._wrong(f"artefacts.{name}", "a recipe's artefacts lie in workspace/step; leave it out")

    def step(self, number: int, step: StepConfig) -> PlannedStep | None:
        """The planned step; None, with the problems noted, where it cannot be."""
        at, before = f"steps[{number}]", len(self.problems)
        if step.name in self.names[:number]:
            self._wrong(f"{at}.name", f"{step.name!r} is the name of steps[{self.names.index(step.name)}] already")
        stage = STAGES.get(step.run)
        if stage is None:
            self._wrong(f"{at}.run", f"unknown stage {step.run!r}{_hint(step.run, STAGES)}")
            self.made.setdefault(step.name, None)
            return None
        data = self._data(at, step, stage)
        read = {kind: uri for kind in stage.reads if (uri := self._read(at, step, kind))}
        for kind in sorted(step.reads.keys() - set(stage.reads)):
            self._wrong(f"{at}.reads.{kind}", f"the stage {step.run} reads {_listed(stage.reads)}")
        workspace = join(self.config.workspace, step.name)
        data |= {"workspace": workspace, "artefacts": read}
        planned = None
        try:
            own = from_mapping(RunConfig, data, source=at)
            # Not through the dump: that leaves credentials out.
            own = own.model_copy(update={"storage": self.config.storage, "cluster": self.config.cluster})
            # What a step of an unknown stage makes is unknown: it may be this.
            missing = set() if None in self.made.values() else _needs(step.run, own) - read.keys() - step.reads.keys()
            for kind in sorted(missing):
                self._wrong(at, f"no step before it made what it reads: {kind} (or give artefacts.{kind})")
            planned = PlannedStep(step.name, step.run, own, _inputs(step.run, own))
            if stage.check:
                stage.check(own)
        except ConfigError as error:
            self.problems += [(at if key == "(top)" else f"{at}.{key}", text) for key, text in error.problems]
        except RayembError as error:
            self._wrong(f"{at}.{error.where}", error.what)
        self.made.setdefault(step.name, (_AS.get(stage.makes), _place(workspace, read, stage)))
        return planned if len(self.problems) == before else None

    def _data(self, at: str, step: StepConfig, stage: Stage) -> dict[str, Any]:
        """The sections of all steps with what this one sets otherwise."""
        data: dict[str, Any] = copy.deepcopy(self.common)
        for section in _SECTIONS:
            own = getattr(step, section)
            if own and section not in stage.sections:
                self._wrong(f"{at}.{section}", f"the stage {step.run} is set by {_listed(stage.sections)}")
            elif own:
                data[section] = merged(data.get(section, {}), own)
        if step.init is not None:
            self._refer(f"{at}.init", step, "train", data, ("train", "init"), [step.init])
        if ("init" in step.train or step.init is not None) and "model" not in step.train:
            # A start brings its towers; those of the section of all steps are not meant then.
            data["train"] = {key: value for key, value in data.get("train", {}).items() if key != "model"}
        if step.models is not None:
            self._refer(f"{at}.models", step, "soup", data, ("soup", "models"), step.models)
        elif step.run == "soup" and not data.get("soup", {}).get("models"):
            self._wrong(f"{at}.models", "name the steps whose models are averaged")
        return data

    def _refer(
        self, at: str, step: StepConfig, run: str, data: dict[str, Any], key: tuple[str, str], names: list[str]
    ) -> None:
        """Puts the models of the named steps where the section takes URIs."""
        section, field = key
        if step.run != run:
            self._wrong(at, f"only the stage {run} has it, and this is {step.run}")
            return
        if field in getattr(step, section):
            self._wrong(at, f"give this or {section}.{field}, not both")
        listed = field == "models"
        if listed and len(names) < 2:
            self._wrong(at, "a soup needs two models or more")
        uris = [self._reference(f"{at}[{n}]" if listed else at, name, "model") for n, name in enumerate(names)]
        found = [uri for uri in uris if uri]
        if found:
            data[section] = {**data.get(section, {}), field: found if listed else found[0]}

    def _read(self, at: str, step: StepConfig, kind: ReadName) -> str | None:
        """Where the step reads an artefact of that kind; None if nothing before it made one."""
        if kind in step.reads:
            return self._reference(f"{at}.reads.{kind}", step.reads[kind], kind)
        for made in reversed(self.made.values()):
            if made and made[0] == kind:
                return made[1]
        given = getattr(self.config.artefacts, kind)
        return normalise(given) if given else None

    def _reference(self, at: str, name: str, kind: ReadName) -> str | None:
        """Where the artefact of a step lies; a problem if it made none."""
        if name not in self.made:
            what = f"step {name!r} comes later" if name in self.names else f"unknown step {name!r}"
            self._wrong(at, what + _hint(name, self.made))
            return None
        made = self.made[name]
        if made and made[0] != kind:
            self._wrong(at, f"step {name!r} makes no {kind}")
        # Of a step that is wrong itself, enough has been said.
        return made[1] if made else join(self.config.workspace, name)

    def _wrong(self, key: str, message: str) -> None:
        self.problems.append((key, message))


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `own`, mappings key by key; one with another `name` or `kind` replaces the old one."""
    found = dict(base)
    for key, value in own.items():
        old = found.get(key)
        found[key] = value
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            chosen = [choice for choice in _CHOICES if choice in value]
            if all(value[choice] == old.get(choice) for choice in chosen):
                found[key] = merged(old, value)
    return found


def problems_of(error: ConfigError) -> ConfigError:
    """The error with the steps' keys written as everywhere in a recipe: `steps[3].name`."""
    problems = [(re.sub(r"^steps\.(\d+)", r"steps[\1]", key), text) for key, text in error.problems]
    if not problems:
        return error
    lines = "; ".join(f"{key}: {message}" for key, message in problems)
    return ConfigError(lines, where=error.where, fix=error.fix, problems=problems)


def _needs(run: str, config: RunConfig) -> set[ReadName]:
    """What the step cannot do without."""
    needs: set[ReadName] = set(STAGES[run].reads)
    if run in ("train", "tune", "soup"):
        named = judged_on(config.train) if run == "soup" else {n: e.uri for n, e in config.train.corpora.items()}
        if all(named.values()) or (run == "soup" and config.soup.method == "uniform"):
            needs.discard("corpus")
    if run == "mine":
        needs -= {name for name in ("model", "index") if getattr(config.mine, name)}
    return needs


def _inputs(run: str, config: RunConfig) -> dict[str, tuple[ReadName, str]]:
    """All that the step reads, what lies outside of the recipe too."""
    found: dict[str, tuple[ReadName, str]] = {kind: (kind, config.uri(kind)) for kind in sorted(_needs(run, config))}
    if run in ("train", "tune"):
        corpora = config.train.corpora.items()
        found |= {f"corpora.{name}": ("corpus", entry.uri) for name, entry in corpora if entry.uri}
        if config.train.init:
            found["init"] = ("model", normalise(config.train.init))
    if run == "soup":
        found |= {f"models[{n}]": ("model", normalise(uri)) for n, uri in enumerate(config.soup.models)}
        if config.soup.method == "greedy":
            found |= {f"tasks.{name}": ("corpus", uri) for name, uri in judged_on(config.train).items() if uri}
    if run == "mine":
        outside: dict[str, tuple[ReadName, str | None]] = {
            "model": ("model", config.mine.model),
            "index": ("index", config.mine.index),
            "guide": ("model", config.mine.guide),
        }
        found |= {label: (kind, normalise(uri)) for label, (kind, uri) in outside.items() if uri}
    return found


def _place(workspace: str, read: Mapping[ReadName, str], stage: Stage) -> str:
    """Where the step's artefact lies: in its folder, or, of a stage that only looks at one, where that is."""
    looked_at = [uri for kind, uri in read.items() if kind == stage.makes]
    return looked_at[0] if looked_at else RunConfig(workspace=workspace).uri(stage.makes)


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(known)}" if known else "; there is none before it"


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names) or "nothing"
