"""Pictures of the data, small enough for a page."""

import base64
import io

from rayemb.models.images import decode_image

THUMBNAIL = 160
"""Longest side of a picture on the page, in pixels: twice the shown size, for dense screens."""


def picture(data: bytes, side: int = THUMBNAIL, quality: int = 90) -> str:
    """A small copy as a data URI: bounded size, a format every browser reads, none of the file's metadata.

    Raises ImageError for what does not decode.
    """
    image = decode_image(data)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
