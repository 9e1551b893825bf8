"""The table in `decode_image`'s docstring, line by line, against values computed without Pillow's conversions."""

import io
import itertools
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from rayemb.models import ImageError, ImageLimits, decode_image
from rayemb.models.images import _transform
from tests.models.pictures import (
    cmyk_profile,
    encode,
    grey_profile,
    noise,
    png_chunk,
    png_that_claims,
    quarters,
    raw_png,
    rgb_profile,
)
from tests.models.test_images import UPRIGHT, colours

DEEP = np.array([[0, 1, 255, 256, 257, 0x1234, 0x80FF, 0xFEFF, 0xFF00, 0xFFFF]])


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`alpha` in 0..1."""
    return colour * alpha + 255 * (1 - alpha)


# -- orientation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_in_every_format_that_has_it(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = quarters().resize((64, 32), Image.Resampling.NEAREST)
    image = decode_image(encode(large, kind, exif=exif, **({} if kind == "TIFF" else {"quality": 95})))
    assert image.size == ((64, 32) if orientation < 5 else (32, 64))
    assert np.abs(np.array(colours(image)) - np.array(UPRIGHT[orientation])).max() < 12


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(pixels(encode(quarters(), "PNG", exif=exif)), np.asarray(quarters()))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"x" * 50]
)
def test_exif_that_cannot_be_read_does_not_cost_the_picture(exif: bytes) -> None:
    data = encode(Image.new("RGB", (8, 8), (200, 10, 10)), "JPEG", quality=95)
    damaged = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert np.abs(pixels(damaged) - [200, 10, 10]).max() <= 4


def test_a_deep_picture_is_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray((DEEP * np.ones((2, 1), int)).astype(np.uint16)), "PNG", exif=exif)
    image = decode_image(data)
    assert image.size == (2, 10)
    assert image.getpixel((0, 9)) == (255, 255, 255)


# -- depths ----------------------------------------------------------------------------------------------------


def test_16_bit_colour_is_its_high_byte() -> None:
    samples = np.stack([DEEP, DEEP[:, ::-1], DEEP // 3], axis=-1)
    found = pixels(raw_png(samples, 16, 2))
    assert np.array_equal(found, samples // 256)
    assert np.abs(found - samples / 257).max() <= 1


def test_16_bit_colour_and_grey_with_alpha_are_laid_on_white() -> None:
    alpha = np.array([[0, 0xFFFF, 0x8000, 0x4000, 0xFFFF, 0, 0x8000, 0xFFFF, 0xC000, 0x10FF]])
    for channels, colour_type in ((3, 6), (1, 4)):
        samples = np.concatenate([DEEP[..., None]] * channels + [alpha[..., None]], axis=-1)
        found = pixels(raw_png(samples, 16, colour_type))
        wanted = on_white(DEEP[..., None] / 257, alpha[..., None] / 65535)
        assert np.abs(found - wanted).max() <= 2


def test_16_bit_grey_with_a_transparent_value() -> None:
    found = pixels(raw_png(DEEP, 16, 0, png_chunk(b"tRNS", struct.pack(">H", 257))))
    wanted = np.where(DEEP == 257, 255, DEEP / 257)[..., None]
    assert np.abs(found - wanted).max() <= 1


def test_16_bit_colour_with_a_transparent_colour() -> None:
    samples = np.stack([DEEP] * 3, axis=-1)
    found = pixels(raw_png(samples, 16, 2, png_chunk(b"tRNS", struct.pack(">3H", *[0x80FF] * 3))))
    assert np.array_equal(found, np.where(samples == 0x80FF, 255, samples // 256))
    # One whose low byte alone is set must not hit the pixels that show that value.
    found = pixels(raw_png(samples, 16, 2, png_chunk(b"tRNS", struct.pack(">3H", 0x00FF, 0x00FF, 0x00FF))))
    assert found[0, 9].tolist() == [255] * 3
    assert found[0, 6].tolist() == [0x80] * 3


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_grey_are_spread_over_the_range(bits: int) -> None:
    samples = np.arange(2**bits)[None]
    assert np.array_equal(pixels(raw_png(samples, bits, 0))[..., 0], samples * 255 // (2**bits - 1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_every_depth(bits: int) -> None:
    palette = np.random.default_rng(bits).integers(0, 256, (2**bits, 3))
    samples = np.arange(2**bits)[None]
    chunk = png_chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    assert np.array_equal(pixels(raw_png(samples, bits, 3, chunk))[0], palette)
    alpha = np.linspace(0, 255, 2**bits).round().astype(int)
    transparent = png_chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
    found = pixels(raw_png(samples, bits, 3, chunk, transparent))[0]
    assert np.abs(found - on_white(palette, alpha[:, None] / 255)).max() <= 1


def test_16_bit_portable_maps() -> None:
    data = b"P5 10 1 65535\n" + DEEP.astype(">u2").tobytes()
    assert np.abs(pixels(data)[..., 0] - DEEP / 257).max() <= 1


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_samples_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="are not a picture") as caught:
        decode_image(encode(Image.new(mode, (4, 4)), "TIFF"))
    assert caught.value.reason == "unreadable"


# -- CMYK ------------------------------------------------------------------------------------------------------

INKS = np.array(list(itertools.product((0, 80, 255), repeat=4)))


def cmyk_jpeg(inks: np.ndarray, *, adobe: bool) -> bytes:
    """A JPEG of one colour whose samples are 255 - ink, as Adobe writes them."""
    data = encode(Image.new("CMYK", (8, 8), tuple(int(ink) for ink in inks)), "JPEG", quality=100)
    marker = data.index(b"\xff\xee")
    assert data[marker + 4 : marker + 9] == b"Adobe"
    return data if adobe else data[:marker] + data[marker + 2 + struct.unpack(">H", data[marker + 2 : marker + 4])[0] :]


@pytest.mark.parametrize("adobe", [True, False])
def test_inverted_cmyk_of_a_jpeg(adobe: bool) -> None:
    for inks in INKS[::7]:
        wanted = (255 - inks[:3]) * (255 - inks[3]) / 255
        assert np.abs(pixels(cmyk_jpeg(inks, adobe=adobe)) - wanted).max() <= 4


def test_cmyk_of_a_tiff_is_as_it_stands() -> None:
    image = Image.fromarray(INKS.astype(np.uint8)[None], "CMYK")
    wanted = (255 - INKS[:, :3]) * (255 - INKS[:, 3:]) / 255
    assert np.abs(pixels(encode(image, "TIFF"))[0] - wanted).max() <= 1


# -- colour profiles -------------------------------------------------------------------------------------------

# XYZ of the primaries under the profile's white, by row; sRGB's own are published in IEC 61966-2-1, adapted to D50.
SRGB = np.array([(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)])
DISPLAY_P3 = np.array([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)])
ADOBE_RGB = np.array([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])


def encoded_srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


def to_srgb(colour: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    return encoded_srgb(((colour / 255) ** gamma) @ primaries @ np.linalg.inv(SRGB))


COLOURS = np.array(
    [(200, 100, 50), (0, 0, 0), (255, 255, 255), (128, 128, 128), (30, 200, 90), (255, 0, 0), (90, 30, 220)]
)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB], ids=["p3", "adobe"])
def test_colours_of_a_wide_gamut_become_srgb(kind: str, primaries: np.ndarray) -> None:
    profile = rgb_profile(primaries, 2.2)
    picture = Image.fromarray(np.repeat(np.repeat(COLOURS[None], 16, 0), 16, 1).astype(np.uint8))
    options = {"lossless": True} if kind == "WEBP" else {} if kind in ("PNG", "TIFF") else {"quality": 100}
    if kind in ("JPEG", "AVIF"):
        options["subsampling"] = "4:4:4"
    found = pixels(encode(picture, kind, icc_profile=profile, **options))[8, 8::16]
    assert np.abs(found - to_srgb(COLOURS, primaries, 2.2)).max() <= (2 if "quality" not in options else 8)


def test_alpha_stays_what_it_is_under_a_profile() -> None:
    picture = Image.new("RGBA", (2, 2), (200, 100, 50, 128))
    found = pixels(encode(picture, "PNG", icc_profile=rgb_profile(DISPLAY_P3, 2.2)))
    wanted = on_white(to_srgb(np.array([200, 100, 50]), DISPLAY_P3, 2.2), np.array(128 / 255))
    assert np.abs(found - wanted).max() <= 2


def test_a_palette_under_a_profile() -> None:
    chunk = png_chunk(b"PLTE", bytes([200, 100, 50]))
    profile = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(rgb_profile(DISPLAY_P3, 2.2)))
    found = pixels(raw_png(np.zeros((1, 2), int), 8, 3, profile, chunk))
    assert np.abs(found - to_srgb(np.array([200, 100, 50]), DISPLAY_P3, 2.2)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_of_another_gamma(mode: str) -> None:
    picture = Image.new(mode, (2, 2), 100 if mode == "L" else (100, 128))
    found = pixels(encode(picture, "PNG", icc_profile=grey_profile(1.0)))
    wanted = encoded_srgb(np.array(100 / 255))
    assert np.abs(found - (wanted if mode == "L" else on_white(wanted, np.array(128 / 255)))).max() <= 2


def test_cmyk_by_its_profile() -> None:
    # Without ink white, with all inks black, and between them one grey: unlike every formula. (A profile without
    # black would not do: black points are matched, as viewers do.)
    corner = np.full((2, 2, 2, 2, 3), 128)
    corner[0, 0, 0, 0, 0], corner[1, 1, 1, 1, 0] = 255, 0
    profile = cmyk_profile(corner)
    lightness = 128 / 255 * 100
    grey = encoded_srgb(np.array(((lightness + 16) / 116) ** 3))
    for inks, wanted in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), grey), ((0, 255, 255, 0), grey), ((255,) * 4, 0)):
        picture = Image.new("CMYK", (8, 8), inks)
        assert np.abs(pixels(encode(picture, "TIFF", icc_profile=profile)) - wanted).max() <= 3
        assert np.abs(pixels(encode(picture, "JPEG", icc_profile=profile, quality=100)) - wanted).max() <= 4


def test_a_profile_that_changes_nothing_leaves_every_byte() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = noise(64, 64)
    assert np.array_equal(pixels(encode(picture, "PNG", icc_profile=profile)), np.asarray(picture))
    assert _transform(profile, "RGB") is None


@pytest.mark.parametrize(
    "profile",
    [
        b"junk" * 100,
        rgb_profile(DISPLAY_P3, 2.2)[:300],
        rgb_profile(DISPLAY_P3, 2.2)[:-40],
        grey_profile(1.0),
        cmyk_profile(np.zeros((2, 2, 2, 2, 3))),
        rgb_profile(DISPLAY_P3, 2.2) + bytes(5 << 20),
    ],
    ids=["junk", "header", "cut", "grey", "cmyk", "large"],
)
def test_a_profile_that_cannot_be_used_is_ignored(profile: bytes) -> None:
    picture = noise(20, 10)
    assert np.array_equal(pixels(encode(picture, "TIFF", icc_profile=profile)), np.asarray(picture))


# -- what is refused -------------------------------------------------------------------------------------------


def gif_that_claims(width: int, height: int, frame: tuple[int, int] | None = None) -> bytes:
    w, h = frame or (width, height)
    palette = bytes([0, 0, 0, 255, 255, 255])
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + palette
    return head + b"," + struct.pack("<HHHHB", 0, 0, w, h, 0) + b"\x02\x02\x4c\x01\x00;"


def tiff_that_claims(width: int, height: int, tile: tuple[int, int] | None = None) -> bytes:
    """Deflated zeros, in one strip or one tile."""
    body = zlib.compress(bytes(100_000))
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)]
    if tile:
        tags += [(322, tile[0]), (323, tile[1]), (324, 8), (325, len(body))]
    else:
        tags += [(273, 8), (278, height), (279, len(body))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + bytes(4)


def bmp_that_claims(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + head + bytes(100)


def webp_that_claims(width: int, height: int) -> bytes:
    """An animation with a canvas of this size and one small frame."""
    still = encode(Image.new("RGB", (4, 4)), "WEBP", lossless=True)
    frame = still[12:]

    def three(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    moving = three(0) + three(0) + three(3) + three(3) + three(100) + b"\0" + frame
    chunks = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + three(width - 1) + three(height - 1)
    chunks += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(moving)) + moving
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def text_bomb(kind: bytes, size: int = 100 << 20) -> bytes:
    packed = zlib.compress(bytes(size))
    body = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind] + packed
    return raw_png(np.zeros((1, 1), int), 8, 0, png_chunk(kind, body))


def late_text_bomb() -> bytes:
    """Behind the pixels: it is met when they are decoded."""
    data = raw_png(np.zeros((1, 1), int), 8, 0)
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20)))
    return data[:-12] + bomb + data[-12:]


def frames(count: int) -> bytes:
    """A GIF of many large frames."""
    one = encode(Image.new("P", (2000, 2000), 7), "GIF")
    start = one.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 2000, 2000))
    return one[:start] + one[start:-1] * count + one[-1:]


BOMBS = {
    "png": png_that_claims(50_000, 50_000),
    "gif": gif_that_claims(50_000, 50_000),
    "gif frame": gif_that_claims(10, 10, (50_000, 50_000)),
    "tiff": tiff_that_claims(50_000, 50_000),
    "tiff tile": tiff_that_claims(16, 16, (40_000, 40_000)),
    "bmp": bmp_that_claims(50_000, 50_000),
    "webp": webp_that_claims(16_000, 16_000),
    "ppm": b"P6 50000 50000 255\n" + bytes(100),
    "zTXt": text_bomb(b"zTXt"),
    "iTXt": text_bomb(b"iTXt"),
    "iCCP": text_bomb(b"iCCP"),
    "zTXt at the end": late_text_bomb(),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str) -> None:
    assert len(BOMBS[name]) < 1_000_000
    with pytest.raises(ImageError) as caught:
        decode_image(BOMBS[name])
    assert caught.value.reason == "too_large"


MEASURE = """
import pickle, resource, sys
from rayemb.models import ImageError, decode_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
start = peak()
for name, data in pickle.load(sys.stdin.buffer).items():
    try:
        decode_image(data)
    except ImageError:
        pass
    print(name, peak() - start)
"""


def test_bombs_take_no_memory() -> None:
    import pickle

    given = {**BOMBS, "1,000 frames": frames(1000)}
    run = subprocess.run([sys.executable, "-c", MEASURE], input=pickle.dumps(given), capture_output=True, check=True)
    lines = run.stdout.decode().splitlines()
    assert len(lines) == len(given)
    assert int(lines[-1].split()[-1]) < 150, lines  # MiB; one of the bombs alone would take gigabytes


def test_a_tiled_tiff_that_is_none_is_read() -> None:
    assert decode_image(encode(noise(40, 30), "TIFF", tile=(16, 16))).size == (40, 30)
    with pytest.raises(ImageError, match="tile of the image has 256 x 256 pixels, over 1,000"):
        decode_image(tiff_that_claims(16, 16, (256, 256)), ImageLimits(max_pixels=1000))


@pytest.mark.parametrize(
    "data",
    [
        png_that_claims(0, 5),
        gif_that_claims(0, 0),
        bmp_that_claims(0, 0),
        b"P6 0 0 255\n",
        tiff_that_claims(0, 7),
    ],
    ids=["png", "gif", "bmp", "ppm", "tiff"],
)
def test_a_picture_without_pixels_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM"])
def test_cut_anywhere_it_is_refused_or_whole(kind: str) -> None:
    data = encode(noise(24, 24), kind)
    whole = np.asarray(decode_image(data))
    outcomes = set()
    for cut in range(0, len(data), max(1, len(data) // 60)):
        try:
            image = decode_image(data[:cut])
        except ImageError as error:
            outcomes.add(error.reason)
            continue
        assert np.array_equal(np.asarray(image), whole)  # only what follows the pixels was lost
        assert cut > len(data) * 0.9
    assert outcomes <= {"empty", "truncated", "unreadable"}
    assert len(outcomes) > 1


def test_the_content_decides_and_not_a_name() -> None:
    picture = Image.new("RGB", (8, 8), (10, 200, 30))
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encode(picture, kind)
        assert Image.open(io.BytesIO(data)).format == kind
        assert np.abs(pixels(data) - [10, 200, 30]).max() <= 8
    for data in (b"<html></html>", b"%PDF-1.7", b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"):
        with pytest.raises(ImageError):
            decode_image(data)
