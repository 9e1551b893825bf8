"""From untrusted image bytes to the pixels that a network sees: one meaning for every format, limits first."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field

from rayemb.config import Config
from rayemb.errors import RayembError

# Only decoders that take untrusted bytes: Pillow would hand PostScript to Ghostscript, and knows forty formats more.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_MODES_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class ImageError(RayembError):
    """Bytes that are not an acceptable image; `reason` is one short word for counting."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", reason: str = "unreadable") -> None:
        super().__init__(what, where=where, fix=fix)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_error, (self.what, self.where, self.fix, self.reason)


def _rebuild_error(what: str, where: str, fix: str, reason: str) -> ImageError:
    return ImageError(what, where=where, fix=fix, reason=reason)


class ImageLimits(Config):
    """What an image from outside may be. Checked before its pixels are decoded."""

    max_bytes: int = Field(20_000_000, gt=0, description="size of the encoded file, in bytes")
    max_pixels: int = Field(50_000_000, gt=0, description="width times height, in pixels")


def decode_image(data: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """The first frame of an encoded image (one of `FORMATS`) as upright 8-bit RGB.

    EXIF orientation is applied; transparency is laid on white; palettes, CMYK and greyscale become RGB;
    16-bit samples are scaled to 8 (Pillow's own conversion saturates them).
    Raises ImageError (`reason`: `empty`, `too_large`, `unreadable`, `truncated`).
    """
    limits = limits or ImageLimits()
    if not data:
        raise ImageError("the image is empty", reason="empty")
    if len(data) > limits.max_bytes:
        raise ImageError(f"the image has {len(data):,} bytes, over {limits.max_bytes:,}", reason="too_large")
    try:
        with warnings.catch_warnings():
            # Pillow warns at 89 MP and raises at 179 MP; our own limit below is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(str(error), reason="too_large") from error
    except Exception as error:  # mostly UnidentifiedImageError; the AVIF plugin raises RuntimeError
        raise ImageError("not an image that can be read", fix=f"use {', '.join(FORMATS)}") from error
    if image.width * image.height > limits.max_pixels:
        raise ImageError(
            f"the image has {image.width} x {image.height} pixels, over {limits.max_pixels:,}", reason="too_large"
        )
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise a zoo: OSError, SyntaxError, struct.error, zlib.error, ...
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise ImageError(f"the image does not decode ({error})", reason=reason) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _MODES_16_BIT:
        samples = np.asarray(image).astype(np.float32)
        image = Image.fromarray((samples / 257.0).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        front = image.convert("RGBA")
        back = Image.new("RGBA", front.size, "white")
        return Image.alpha_composite(back, front).convert("RGB")
    return image.convert("RGB")


def image_tensor(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The picture fitted into a white square, `(3, size, size)` uint8; its aspect ratio is kept."""
    if image.size != (size, size):
        # Not ImageOps.pad: it rounds the short side of a thin picture to 0, which is blank, and an exception
        # in older versions of Pillow.
        longest = max(image.size)
        inner = (max(1, round(image.width / longest * size)), max(1, round(image.height / longest * size)))
        square = Image.new("RGB", (size, size), "white")
        square.paste(
            image.resize(inner, Image.Resampling.BICUBIC), (round((size - inner[0]) / 2), round((size - inner[1]) / 2))
        )
        image = square
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
