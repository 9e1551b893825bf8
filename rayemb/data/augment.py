"""Augmentation: random, but the same for the same row in the same step, wherever it is decoded."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from pydantic import Field

from rayemb.config import Config

DRAWS = 11
_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


class TextAugmentConfig(Config):
    """What is varied in the text of a pair each time it is used, not in its query; by default nothing.

    Mirror-BERT (Liu et al., 2021; card S131) masks spans of 5 characters.
    """

    mask_span: int = Field(
        0, ge=0, description="characters, from a random one on, that one mask token stands in for; 0 for none"
    )
    mask_from: int = Field(30, ge=1, description="a text with fewer characters stays whole")

    def span(self, text: str, u: float) -> tuple[int, int] | None:
        """The characters of `text` that are masked, for a number `u` in [0, 1); None if it stays whole."""
        if not self.mask_span or len(text) < max(self.mask_from, self.mask_span):
            return None
        start = int(u * (len(text) - self.mask_span + 1))
        return start, start + self.mask_span


class AugmentConfig(Config):
    """What is varied in an image, and in a text, each time it is used; by default nothing."""

    crop: tuple[float, float] | None = Field(
        None, description="share of the area that a random crop keeps, e.g. [0.5, 1.0]; its sides within 3:4 and 4:3"
    )
    flip: float = Field(0.0, ge=0, le=1, description="probability of a mirror image (not for texts and signs)")
    jitter: float = Field(0.0, ge=0, lt=1, description="brightness, contrast and saturation times 1 - j to 1 + j")
    grey: float = Field(0.0, ge=0, le=1, description="probability of a greyscale image")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur, radius 0.1 to 2 pixels")

    text: TextAugmentConfig = Field(default_factory=TextAugmentConfig, description="what is varied in texts")

    @property
    def of_images(self) -> bool:
        """Whether anything is varied in images."""
        return self != AugmentConfig(text=self.text)


def draws(seeds: Sequence[int], rows: NDArray[np.int64], number: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), `(N, number)`, that depend on `seeds` and each row's own number alone.

    SplitMix64 (Steele et al., 2014) over a counter: no generator per row has to be set up.
    """
    state: NDArray[np.uint64] = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for seed in seeds:
            state = _mixed(state ^ np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
        base = _mixed(state ^ rows.astype(np.uint64))
        counter = np.arange(1, number + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mixed(base[:, None] + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) & _MASK


def augmented(image: Image.Image, config: AugmentConfig, size: int, u: NDArray[np.float64]) -> Image.Image:
    """The image varied by the numbers `u` (`DRAWS`,); a crop comes at side `size`."""
    if config.crop:
        image = _crop(image, config.crop, size, u[0], u[1], u[2], u[3])
    if u[4] < config.flip:
        image = ImageOps.mirror(image)
    if config.jitter:
        factors = 1 + config.jitter * (2 * u[8:11] - 1)
        image = ImageEnhance.Brightness(image).enhance(factors[0])
        image = ImageEnhance.Contrast(image).enhance(factors[1])
        image = ImageEnhance.Color(image).enhance(factors[2])
    if u[5] < config.grey:
        image = ImageOps.grayscale(image).convert("RGB")
    if u[6] < config.blur:
        image = image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * float(u[7])))
    return image


def _crop(
    image: Image.Image, scale: tuple[float, float], size: int, area: float, ratio: float, x: float, y: float
) -> Image.Image:
    """A random part of the image, resized in the same step (Inception-style; Szegedy et al., 2015)."""
    share = scale[0] + (scale[1] - scale[0]) * area
    aspect = float(np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * ratio))
    width = min(image.width, np.sqrt(share * image.width * image.height * aspect))
    height = min(image.height, share * image.width * image.height / width)
    left, top = x * (image.width - width), y * (image.height - height)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
