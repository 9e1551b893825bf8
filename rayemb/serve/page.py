"""The web page, and what a browser may do with it."""

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from starlette.responses import Response

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
)


_INCLUDE = re.compile(r"/\* include ([a-z]+\.(?:css|js)) \*/")


async def page() -> Response:
    """The search page: one answer with its styles and scripts in it, nothing from another server."""
    html, policy = _page()
    return Response(
        html, media_type="text/html", headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    )


@cache
def _page() -> tuple[bytes, str]:
    html = _INCLUDE.sub(lambda found: _static(found[1]), _static("index.html"))
    # By hash: these very scripts and styles may run, an injected one may not.
    scripts, styles = _hashes(html, "script"), _hashes(html, "style")
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def _static(name: str) -> str:
    return resources.files("rayemb.serve").joinpath(f"static/{name}").read_text(encoding="utf-8")


def _hashes(html: str, tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def sniff(data: bytes) -> str:
    """The content type of an encoded picture by its first bytes; SVG and the unknown are no pictures here."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "image/avif"
    return "application/octet-stream"
