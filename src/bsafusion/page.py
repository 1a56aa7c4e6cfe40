"""What the report pages of a result and of an evaluation share.

A page is one file that needs nothing else: pictures are inside it as PNG data URIs, and its content security policy
allows its own style and script, by their hashes, and no address at all.
"""

from __future__ import annotations

import base64
import hashlib
import io
from html import escape
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

# Dark blue to yellow, equal steps of lightness: the same colours in the viewer (static/stage.js).
_COLOURS = ((13, 8, 60), (92, 22, 110), (175, 50, 90), (230, 95, 45), (250, 165, 25), (250, 250, 150))

_STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1a1f27; --soft: #5b6472; --line: #d9dde3; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e6e9ee; --soft: #9aa4b2;
  --line: #333a45; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 8px; }
p { margin: 4px 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 16px 0; }
figure { margin: 0; }
figure img { width: 100%; display: block; background: #000; border-radius: 6px; }
figcaption { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; }
th, td { text-align: left; border-top: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); }
footer { text-align: center; color: var(--soft); }
@media print { body { padding: 0; max-width: none; font-size: 11px; }
  figure img { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def document(title: str, body: list[str], *, style: str, script: str = "") -> str:
    """The page as text. ``style`` comes after what both pages have; ``title`` is escaped here, ``body`` is HTML."""
    sheet = _STYLE + style
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(sheet)}'"
    if script:
        policy += f"; script-src '{_hash(script)}'"
        body = [*body, f"<script>{script}</script>"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{sheet}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _hash(source: str) -> str:
    """The source expression of Content Security Policy Level 3, section 2.3.1."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")


def figure(caption: str, picture: PIL.Image.Image, *, attributes: str = "", optimize: bool = False) -> str:
    """A picture as a PNG data URI over its caption; ``attributes``: more of the ``img``, a space before each."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=optimize)
    data, text = base64.b64encode(stream.getvalue()).decode("ascii"), escape(caption)
    return (
        f'<figure><img{attributes} alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def picture_of(array: NDArray[Any]) -> PIL.Image.Image:
    """``H W``, ``1 H W`` or ``3 H W`` in [0, 1] with 8 bits; grey where the channels are alike."""
    levels = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
    if levels.ndim == 3 and (levels == levels[:1]).all():
        levels = levels[0]
    return PIL.Image.fromarray(levels if levels.ndim == 2 else np.ascontiguousarray(levels.transpose(1, 2, 0)))


def coloured(unit: NDArray[Any]) -> NDArray[np.float32]:
    """Values in [0, 1] in the colours of the error maps: an axis for red, green and blue in front, in [0, 1]."""
    stops = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(np.clip(unit, 0, 1), stops, channel) for channel in np.array(_COLOURS).T / 255]
    return np.stack(channels).astype(np.float32)
