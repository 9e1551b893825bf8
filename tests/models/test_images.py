"""Image bytes to pixels: one meaning for every format, and a counted reason for what is none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rayemb.models import ImageError, ImageLimits, decode_image, image_tensor
from rayemb.models.images import FORMATS
from tests.models.pictures import encode, noise, png_that_claims, quarters


def colours(image: Image.Image) -> list[object]:
    """The colours in the middle of the four quarters, row by row."""
    w, h = image.size
    return [image.getpixel((x, y)) for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP"])
def test_lossless_formats_give_the_picture(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(encode(quarters(), kind, **options))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(quarters()))


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_lossy_formats_give_nearly_the_picture(kind: str) -> None:
    picture = Image.new("RGB", (32, 32), (200, 100, 50))
    image = decode_image(encode(picture, kind, quality=95))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture)).max() <= 6


# Where each quarter of `quarters()` goes when the camera was turned: (top left, top right, bottom left, bottom right).
UPRIGHT = {
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encode(quarters(), "PNG", exif=exif))
    assert image.size == ((16, 8) if orientation < 5 else (8, 16))
    assert colours(image) == UPRIGHT[orientation]


def test_cmyk_becomes_rgb() -> None:
    image = decode_image(encode(quarters().convert("CMYK"), "TIFF"))
    assert image.mode == "RGB"
    assert np.abs(np.array(colours(image)) - np.array([RED, GREEN, BLUE, WHITE])).max() <= 2


def test_a_palette_becomes_its_colours() -> None:
    image = decode_image(encode(quarters().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)))
    assert colours(image) == [RED, GREEN, BLUE, WHITE]


def test_a_transparent_palette_entry_is_laid_on_white() -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.paste(1, (0, 0, 4, 2))
    image = decode_image(encode(picture, "PNG", transparency=0))
    assert image.getpixel((0, 0)) == (200, 0, 0)
    assert image.getpixel((0, 3)) == WHITE


def test_a_transparent_gif_is_laid_on_white() -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.paste(1, (0, 0, 4, 2))
    image = decode_image(encode(picture, "GIF", transparency=0))
    assert (image.getpixel((0, 0)), image.getpixel((0, 3))) == ((200, 0, 0), WHITE)


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 0), (51, 204)])
def test_transparency_is_laid_on_white(alpha: int, expected: int) -> None:
    for picture in (Image.new("RGBA", (3, 3), (0, 0, 0, alpha)), Image.new("LA", (3, 3), (0, alpha))):
        assert decode_image(encode(picture)).getpixel((1, 1)) == (expected,) * 3


def test_a_transparent_colour_key_is_laid_on_white() -> None:
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (9, 9, 9))
    image = decode_image(encode(picture, "PNG", transparency=(1, 2, 3)))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (9, 9, 9)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_samples_are_scaled_and_do_not_saturate(kind: str) -> None:
    samples = np.array([[0, 257, 0x1234, 0x8000, 0xFF00, 0xFFFF]], dtype=np.uint16)
    image = decode_image(encode(Image.fromarray(samples), kind))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[0, :, 0] - samples[0] / 257).max() < 1
    assert np.asarray(image)[0, 0, 0] == 0
    assert np.asarray(image)[0, -1, 0] == 255


def test_one_bit_becomes_black_and_white() -> None:
    picture = Image.new("1", (2, 1), 0)
    picture.putpixel((1, 0), 1)
    image = decode_image(encode(picture))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), WHITE]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data).getpixel((4, 4)) == RED


def test_a_caller_may_close_over_nothing() -> None:
    image = decode_image(encode(quarters()))
    image.load()  # the pixels are there, the bytes may go
    assert image.getpixel((0, 0)) == RED


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    data = encode(noise(64, 64), kind)
    with pytest.raises(ImageError) as caught:
        decode_image(data[: int(len(data) * share)])
    assert caught.value.reason in ("truncated", "unreadable")


def test_a_truncated_jpeg_is_counted_as_truncated() -> None:
    data = encode(noise(64, 64), "JPEG")
    with pytest.raises(ImageError) as caught:
        decode_image(data[: len(data) // 2])
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("side", [8_000, 12_000, 100_000])
def test_a_bomb_is_refused_by_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def decodes(*_: object) -> None:
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decodes)
    with pytest.raises(ImageError, match=r"pixels") as caught:
        decode_image(png_that_claims(side, side))
    assert caught.value.reason == "too_large"


def test_the_limit_of_pixels_is_exact() -> None:
    data = encode(Image.new("RGB", (10, 20)))
    assert decode_image(data, ImageLimits(max_pixels=200)).size == (10, 20)
    with pytest.raises(ImageError, match="10 x 20 pixels, over 199"):
        decode_image(data, ImageLimits(max_pixels=199))


def test_the_limit_of_bytes_is_exact() -> None:
    data = encode(quarters())
    decode_image(data, ImageLimits(max_bytes=len(data)))
    with pytest.raises(ImageError, match=f"{len(data)} bytes") as caught:
        decode_image(data, ImageLimits(max_bytes=len(data) - 1))
    assert caught.value.reason == "too_large"


def test_empty_bytes_are_refused() -> None:
    with pytest.raises(ImageError, match="empty") as caught:
        decode_image(b"")
    assert caught.value.reason == "empty"


@pytest.mark.parametrize(
    "data", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n", b"\0" * 99]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == "unreadable"
    assert "PNG" in caught.value.fix


def test_postscript_never_reaches_an_interpreter() -> None:
    with pytest.raises(ImageError, match="not an image that can be read"):
        decode_image(encode(quarters(), "EPS"))
    assert "EPS" not in FORMATS


ORIGINALS = [encode(noise(20, 14), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.sampled_from(ORIGINALS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.data())
def test_damaged_bytes_give_an_image_or_an_image_error(
    original: bytes, edits: list[tuple[int, int]], data: st.DataObject
) -> None:
    damaged = bytearray(original)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    keep = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    try:
        outcome = decode_image(bytes(damaged[:keep]), ImageLimits(max_pixels=1_000_000)).mode
    except ImageError as error:
        outcome = error.reason
    assert outcome in ("RGB", "empty", "too_large", "unreadable", "truncated")


@given(st.binary(max_size=200))
def test_any_bytes_give_an_image_or_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data)


# -- the square that a network sees ----------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
def test_a_picture_is_fitted_into_a_white_square(width: int, height: int, size: int) -> None:
    pixels = image_tensor(Image.new("RGB", (width, height), "black"), size)
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    dark = (pixels[0] < 128).nonzero()
    high, wide = (int(axis.max() - axis.min()) + 1 for axis in dark)
    # Its aspect ratio is kept, to the pixel; the longer side fills the square.
    assert max(wide, high) == size
    assert abs(wide - max(1, size * min(1, width / height))) <= 1
    assert abs(high - max(1, size * min(1, height / width))) <= 1


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    image = noise(24, 24)
    assert np.array_equal(image_tensor(image, 24), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1)])
def test_extreme_shapes_still_give_a_square(size: tuple[int, int]) -> None:
    assert image_tensor(Image.new("RGB", size), 32).shape == (3, 32, 32)
