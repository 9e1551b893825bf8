"""From untrusted image bytes to the pixels that a network sees: one meaning for every format, limits first."""

import functools
import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms
from pydantic import Field

from rayemb.config import Config
from rayemb.errors import RayembError

# Only decoders that take untrusted bytes: Pillow would hand PostScript to Ghostscript, and knows forty formats more.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_MODES_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_MAX_PROFILE = 4 << 20
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    """The first frame of an encoded image (one of `FORMATS`, whatever the file is called) as upright 8-bit sRGB.

    | what the file holds            | what comes out                                                                 |
    |--------------------------------|--------------------------------------------------------------------------------|
    | EXIF orientation 1-8           | turned upright; EXIF that cannot be read is ignored                            |
    | palette, 1, 2 or 4 bits a pixel| its colours; 1 bit: black and white                                            |
    | transparency of any kind       | laid on white: alpha, palette entries, a transparent colour                    |
    | 16-bit grey                    | scaled, v / 257 (Pillow's own conversion saturates); 32-bit integers alike     |
    | 16-bit colour                  | the high byte of each sample: within 1 of v / 257                              |
    | floats, CIELAB                 | refused: they have no range, or no agreed white                                |
    | CMYK                           | (1 - ink)(1 - key), unless a profile says otherwise; JPEGs are taken to be     |
    |                                | inverted as Adobe writes them, with the Adobe marker or without, as browsers do|
    | ICC profile (RGB, grey, CMYK)  | converted to sRGB, perceptual intent: the colours a viewer shows; one that is  |
    |                                | broken, over 4 MiB or of another colour space is ignored                       |
    | animation, several pages       | the first frame; the others are not decoded                                    |
    | more than `limits` allow       | refused by the header, no pixel decoded; tiles and text chunks that unpack to  |
    |                                | more than the picture (or 1 MiB) likewise                                      |
    | cut short, damaged, no pixels  | refused                                                                        |

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
        if _is_bomb(error):
            raise ImageError(f"the image unpacks to too much ({error})", reason="too_large") from error
        raise ImageError("not an image that can be read", fix=f"use {', '.join(FORMATS)}") from error
    _check_pixels(image.width, image.height, "image", limits)
    # libtiff unpacks a tile as a whole, and the tile need not fit the picture.
    tags = getattr(image, "tag_v2", {})
    _check_pixels(_tag(tags, _TILE_WIDTH), _tag(tags, _TILE_HEIGHT), "tile of the image", limits)
    try:
        deep = any("16" in str(tile.args) for tile in getattr(image, "tile", []))
        image.load()
        return _to_rgb(_upright(image), deep)
    except Exception as error:  # decoders raise a zoo: OSError, SyntaxError, struct.error, zlib.error, ...
        text = str(error)
        reason = "too_large" if _is_bomb(error) else "truncated" if "truncated" in text.lower() else "unreadable"
        raise ImageError(f"the image does not decode ({text})", reason=reason) from error


def _check_pixels(width: int, height: int, what: str, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise ImageError(f"the {what} has {width} x {height} pixels, over {limits.max_pixels:,}", reason="too_large")


def _tag(tags: Any, number: int) -> int:
    value = tags.get(number, 0)
    return value if isinstance(value, int) else 0


def _is_bomb(error: Exception) -> bool:
    # Pillow's limits for compressed text and profiles in a PNG; it has no class for them.
    return isinstance(error, ValueError) and ("too large" in str(error) or "Too much memory" in str(error))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # what a camera wrote beside the picture must not cost the picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, deep: bool) -> Image.Image:
    """`deep`: 16-bit colours, which Pillow has cut to 8 bits but not the colour that stands for transparent."""
    if image.mode in ("F", "LAB"):
        raise ValueError(f"{image.mode} samples are not a picture")
    profile = image.info.get("icc_profile")
    if image.mode in _MODES_16_BIT:
        image = _from_16_bit(image)
    elif deep and isinstance(key := image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(sample >> 8 for sample in key)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        front = _to_srgb(image.convert("RGBA"), profile)
        back = Image.new("RGBA", front.size, "white")
        return Image.alpha_composite(back, front).convert("RGB")
    if image.mode not in ("L", "CMYK"):
        image = _as_rgb(image)
    return _as_rgb(_to_srgb(image, profile))


def _as_rgb(image: Image.Image) -> Image.Image:
    # Pillow's own conversion copies a picture that is RGB already, too.
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    samples = np.asarray(image).astype(np.float32)
    scaled = Image.fromarray((samples / 257.0).clip(0, 255).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        scaled.putalpha(Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8)))
    return scaled


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """The image in sRGB: RGB(A) or CMYK by its profile; grey with a grey profile becomes RGB."""
    if not isinstance(profile, bytes) or not 128 <= len(profile) <= _MAX_PROFILE:
        return image
    transform = _transform(profile, image.mode)
    if transform is None and image.mode == "RGBA" and (grey := _transform(profile, "L")):
        # A grey picture with alpha: its colours are grey ones.
        colours = ImageCms.applyTransform(image.convert("L"), grey)
        assert colours is not None
        colours.putalpha(image.getchannel("A"))
        return colours
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is None where the image is changed in place
    return converted


@functools.lru_cache(maxsize=8)  # the pictures of one camera or program share theirs; building one takes 2 ms
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB from the profile; None where it cannot be used or changes nothing that can be seen."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.buildTransform(source, srgb, mode, "RGBA" if mode == "RGBA" else "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 6).astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(probe).convert(mode)
    after = ImageCms.applyTransform(before, transform)
    assert after is not None
    seen, meant = (np.asarray(each.convert("RGB"), dtype=np.int16) for each in (after, before))
    return transform if np.abs(seen - meant).max() > 2 else None


def describe_image(data: bytes) -> tuple[str, int, int]:
    """Format, width and height as the header says, before any turning. Raises ImageError if there is no header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise ImageError("not an image that can be read", fix=f"use {', '.join(FORMATS)}") from error
    return str(image.format), image.width, image.height


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
