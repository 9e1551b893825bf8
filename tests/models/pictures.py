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


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(samples: np.ndarray, bits: int, colour_type: int, *extra: bytes) -> bytes:
    """A PNG of samples `(H, W)` or `(H, W, C)`; Pillow cannot write every depth. `extra`: chunks before them."""
    height, width = samples.shape[:2]
    if bits == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        rows = samples.astype(np.uint8).reshape(height, -1)
        if bits < 8:
            unpacked = np.unpackbits(rows[:, :, None], axis=2)[:, :, 8 - bits :].reshape(height, -1)
            rows = np.packbits(unpacked, axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(extra) + body


def _number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def icc_profile(space: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    """An ICC profile (version 2) of these tags, over the usual white."""
    description = b"by hand"
    named = b"desc\0\0\0\0" + struct.pack(">I", len(description) + 1) + description + b"\0" * 79
    white = b"XYZ \0\0\0\0" + b"".join(map(_number, (0.9642, 1.0, 0.8249)))
    every = [(b"desc", named + b"\0" * (-len(named) % 4)), (b"wtpt", white), *tags]
    start = 128 + 4 + 12 * len(every)
    table, body = struct.pack(">I", len(every)), b""
    for name, data in every:
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    pcs = b"Lab " if space == b"CMYK" else b"XYZ "
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, kind, space, pcs)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += b"".join(map(_number, (0.9642, 1.0, 0.8249)))
    return header + bytes(128 - len(header)) + table + body


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """`primaries` `(3, 3)`: XYZ of red, green and blue by row."""
    tags = [
        (name, b"XYZ \0\0\0\0" + b"".join(map(_number, row)))
        for name, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    ]
    return icc_profile(b"RGB ", tags + [(name, _curve(gamma)) for name in (b"rTRC", b"gTRC", b"bTRC")])


def grey_profile(gamma: float) -> bytes:
    return icc_profile(b"GRAY", [(b"kTRC", _curve(gamma))])


def cmyk_profile(corner: np.ndarray) -> bytes:
    """`corner` `(2, 2, 2, 2, 3)`: L, a, b as bytes (a and b with 128 for 0) at each corner of the ink cube."""
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(_number(x) for x in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    table += straight * 4 + corner.astype(np.uint8).tobytes() + straight * 3
    return icc_profile(b"CMYK", [(b"A2B0", table + b"\0" * (-len(table) % 4))])


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
