"""Configs: YAML and overrides in, every wrong key named, the same config out again."""

import contextlib
import json
import math
import pickle
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from rayemb.config import Config, ConfigError, dump, from_mapping, load, schema
from rayemb.data import CorpusConfig, EmbedConfig
from rayemb.errors import RayembError
from rayemb.losses import InfoNCEConfig
from rayemb.models import ImageError, TwoTowerConfig


class Circle(Config):
    name: Literal["circle"] = "circle"
    radius: float = Field(1.0, gt=0, description="metres")


class Square(Config):
    name: Literal["square"] = "square"
    side: float = Field(1.0, gt=0, description="metres")
    corners: tuple[int, ...] = (1, 2)


class Colour(Config):
    red: int = Field(0, ge=0, le=255)
    tint: str | None = None


class Drawing(Config):
    shape: Annotated[Circle | Square, Field(discriminator="name")] = Circle()
    shapes: list[Annotated[Circle | Square, Field(discriminator="name")]] = Field(default_factory=list)
    colour: Colour = Colour()
    title: str = "none"
    scale: float = 1.0

    @model_validator(mode="after")
    def _agree(self) -> "Drawing":
        if self.title == "forbidden":
            raise ValueError("this title is forbidden")
        return self


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_without_a_file() -> None:
    assert load(Drawing) == Drawing()


def test_yaml_then_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "title: Grüße 漢字\nshape: {name: square, side: 2}\ncolour: {red: 3, tint: x}\n")
    config = load(Drawing, path, ["shape.side=4.5", "shape.corners=[7, 8]", "colour.tint=null", "scale=1e-3"])
    assert config.title == "Grüße 漢字"
    assert config.shape == Square(side=4.5, corners=(7, 8))
    assert config.colour == Colour(red=3, tint=None)
    assert config.scale == 1e-3


def test_an_override_makes_the_mappings_on_its_way() -> None:
    assert load(Drawing, None, ["colour.red=9"]).colour.red == 9


def test_a_later_override_wins() -> None:
    assert load(Drawing, None, ["title=a", "title=b"]).title == "b"


def test_an_override_value_may_hold_an_equals_sign() -> None:
    assert load(Drawing, None, ["title=a=b"]).title == "a=b"


def test_an_override_of_one_key_leaves_a_yaml_alias_of_it_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "shapes: []\nshape: &x {name: circle, radius: 2}\n")
    path.write_text("shapes: [&x {name: circle, radius: 2}]\nshape: *x\n", encoding="utf-8")
    config = load(Drawing, path, ["shape.radius=5"])
    assert config.shape == Circle(radius=5)
    assert config.shapes == [Circle(radius=2)]


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(Drawing, written(tmp_path, "")) == Drawing()


def test_an_unknown_key_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"colour\.redd: unknown key\. did you mean 'red'\?") as caught:
        from_mapping(Drawing, {"colour": {"redd": 1}})
    assert caught.value.problems == [("colour.redd", "unknown key. did you mean 'red'?")]


def test_an_unknown_key_without_a_neighbour_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="known keys: red, tint"):
        from_mapping(Drawing, {"colour": {"zzz": 1}})


def test_an_unknown_key_inside_a_union_is_compared_with_the_chosen_member_only() -> None:
    with pytest.raises(ConfigError, match="did you mean 'side'") as caught:
        from_mapping(Drawing, {"shape": {"name": "square", "sides": 2}})
    assert "radius" not in str(caught.value)


def test_an_unknown_key_inside_a_list_of_unions() -> None:
    with pytest.raises(ConfigError, match="did you mean 'radius'"):
        from_mapping(Drawing, {"shapes": [{"name": "square"}, {"name": "circle", "radios": 2}]})


def test_every_wrong_key_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Drawing, {"colour": {"red": 300, "tint": 4}, "scale": "big", "nope": 1}, source="here.yaml")
    assert {key for key, _ in caught.value.problems} == {"colour.red", "colour.tint", "scale", "nope"}
    assert caught.value.where == "here.yaml"
    assert "less than or equal to 255 (got 300)" in str(caught.value)
    assert "(got 'big')" in str(caught.value)


def test_the_union_is_chosen_by_its_tag() -> None:
    assert from_mapping(Drawing, {"shape": {"name": "square"}}).shape == Square()


def test_a_wrong_tag_names_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r"shape: .*'circle', 'square'"):
        from_mapping(Drawing, {"shape": {"name": "hexagon"}})


def test_a_missing_tag_is_an_error() -> None:
    with pytest.raises(ConfigError, match="shape"):
        from_mapping(Drawing, {"shape": {"side": 2}})


def test_a_validator_of_the_whole_says_its_sentence() -> None:
    with pytest.raises(ConfigError, match=r"\(top\): this title is forbidden"):
        from_mapping(Drawing, {"title": "forbidden"})


@pytest.mark.parametrize("override", ["", "title", "=x", "colour.=1", ".red=1", "colour..red=1"])
def test_an_override_of_wrong_form_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"key\.sub=value"):
        load(Drawing, None, [override])


def test_an_override_with_a_wrong_value_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"colour\.red.*not valid YAML"):
        load(Drawing, None, ["colour.red=[1, 2"])


def test_an_override_through_a_scalar_is_refused() -> None:
    with pytest.raises(ConfigError, match="title is not a mapping"):
        load(Drawing, None, ["title=x", "title.sub=1"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected a mapping at the top"):
        load(Drawing, written(tmp_path, text))


def test_a_file_with_keys_that_are_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(Drawing, written(tmp_path, "1: x\n"))


def test_broken_yaml_names_the_file_and_the_line(tmp_path: Path) -> None:
    path = written(tmp_path, "title: a\nshape: [1,\n")
    with pytest.raises(ConfigError, match=r"not valid YAML.*line 3") as caught:
        load(Drawing, path)
    assert caught.value.where == str(path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("title: Grüße".encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(Drawing, path)


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(Drawing, written(tmp_path, "title: !!python/object/apply:os.getcwd []\n"))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the config") as caught:
            load(Drawing, path)
        assert caught.value.where == str(path)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"scale: .*finite"):
        load(Drawing, None, [f"scale={value}"])


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Drawing().title = "other"  # type: ignore[misc]


shapes = st.one_of(
    st.builds(Circle, radius=st.floats(1e-30, 1e30)),
    st.builds(Square, side=st.floats(1e-30, 1e30), corners=st.lists(st.integers()).map(tuple)),
)
drawings = st.builds(
    Drawing,
    shape=shapes,
    shapes=st.lists(shapes, max_size=3),
    colour=st.builds(Colour, red=st.integers(0, 255), tint=st.none() | st.text()),
    title=st.text().filter(lambda text: text != "forbidden"),
    scale=st.floats(allow_nan=False, allow_infinity=False),
)


@given(drawings)
def test_what_is_dumped_loads_as_the_same(tmp_path_factory: pytest.TempPathFactory, config: Drawing) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(Drawing, path) == config


leaves = st.none() | st.booleans() | st.floats() | st.text(max_size=8)
keys = st.sampled_from(["shape", "shapes", "colour", "title", "scale", "name", "side"]) | st.text(max_size=8)
documents = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


@given(documents)
def test_any_document_gives_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, document: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    try:
        ok = math.isfinite(load(Drawing, path).scale)
    except ConfigError as error:
        ok = str(path) in str(error)
    assert ok


@given(st.text())
def test_any_override_gives_a_config_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert math.isfinite(load(Drawing, None, [text]).scale)


@pytest.mark.parametrize("model", [Drawing, TwoTowerConfig, InfoNCEConfig, CorpusConfig, EmbedConfig])
def test_the_schema_is_one_and_accepts_what_the_config_dumps(model: type[Config]) -> None:
    document = json.loads(schema(model))
    jsonschema.Draft202012Validator.check_schema(document)
    validator = jsonschema.Draft202012Validator(document)
    validator.validate(yaml.safe_load(dump(model())))
    assert not validator.is_valid({"no_such_key": 1})


def test_the_schema_carries_the_descriptions() -> None:
    assert "softmax temperature" in schema(InfoNCEConfig)


# -- errors cross process borders ------------------------------------------------------------------------------


class KitchenError(RayembError):
    pass


@pytest.mark.parametrize("kind", [RayembError, KitchenError])
def test_errors_survive_pickling(kind: type[RayembError]) -> None:
    error = kind("it is wrong.", where="a.b", fix="make it right")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.what, again.where, again.fix, str(again)) == (error.what, error.where, error.fix, str(error))
    assert str(error) == "a.b: it is wrong. make it right"


def test_config_errors_survive_pickling_with_their_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Drawing, {"scale": "x", "nope": 1})
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is ConfigError
    assert len(again.problems) == 2
    assert again.problems == caught.value.problems
    assert str(again) == str(caught.value)


def test_image_errors_survive_pickling_with_their_reason() -> None:
    again = pickle.loads(pickle.dumps(ImageError("bad", where="row 3", fix="send another", reason="too_large")))
    assert type(again) is ImageError
    assert (again.what, again.where, again.fix, again.reason) == ("bad", "row 3", "send another", "too_large")
