"""Small pictures for tests."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    samples = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(samples)


def quarters() -> Image.Image:
    """16 x 8 with a red, a green, a blue and a white quarter (clockwise from the top left: r, g, w, b)."""
    image = Image.new("RGB", (16, 8), "white")
    image.paste((255, 0, 0), (0, 0, 8, 4))
    image.paste((0, 255, 0), (8, 0, 16, 4))
    image.paste((0, 0, 255), (0, 4, 8, 8))
    return image


def png_that_claims(width: int, height: int) -> bytes:
    """A well-formed PNG header over a handful of bytes: decoding it would allocate `width * height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
