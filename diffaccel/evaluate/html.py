"""Pieces of the HTML pages: one self-contained file each, no scripts, readable on a phone, in print, light or dark."""

import base64
import html
import json
from collections.abc import Sequence

import torch
from torch.nn import functional

from ..core.images import png_bytes, sheet

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --faint: #555; --line: #ddd; --soft: #f5f5f5; --page: #fff;
  --accent: #1b5fa7; --alarm: #8a4b00; --alarm-soft: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --faint: #a8a8a8; --line: #3a3a3a; --soft: #242424;
  --page: #161616; --accent: #7db4f0; --alarm: #ffcf8a; --alarm-soft: #33270f; } }
@media print { :root { color-scheme: light; --ink: #000; --faint: #333; --line: #999; --soft: #fff; --page: #fff;
  --accent: #1b5fa7; --alarm: #000; --alarm-soft: #fff; } body { margin: 0; max-width: none; }
  figure, .card, tr { break-inside: avoid; } h2 { break-after: avoid; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--page); }
h1 { line-height: 1.25; overflow-wrap: anywhere; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; } .wide table { margin: .3rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; max-width: 100%; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
img { image-rendering: pixelated; max-width: 100%; height: auto; } img.smooth { image-rendering: auto; }
svg { max-width: 100%; fill: var(--accent); } svg[viewBox] { height: auto; } polyline { stroke: var(--accent); }
pre { background: var(--soft); padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.small { color: var(--faint); font-size: 13px; }
"""


_SMALL = 64  # images up to this size are shown pixel by pixel; eight of them fit half a page
_EDGES = (128, 96, 64, 48, 32)  # thumbnails of larger ones


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        parts: HTML of the body, in order.
        style: CSS of this page, after the shared one.
    """
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>"
    )
    page = f"{head}<body>{''.join(parts)}</body></html>\n"
    # File names that are not UTF-8 reach Python as lone surrogates, which no UTF-8 file can hold.
    return page.encode("utf-8", "backslashreplace").decode()


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of plain texts, without a heading line if ``header`` is empty; ``kind`` is its CSS class."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"] if header else []
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<div class='wide'><table{f' class={kind!r}' if kind else ''}>{''.join(lines)}</table></div>"


def figure(caption: str, image: torch.Tensor, alt: str | None = None, *, smooth: bool = False) -> str:
    """One uint8 image (C, H, W) with a caption, as a PNG inside the page.

    Args:
        caption, alt: plain texts; ``alt`` None repeats the caption.
        smooth: the image holds photographs and may be scaled smoothly; otherwise pixels stay visible as they are.
    """
    return _figure(caption, png_bytes(image), alt, smooth)


def record(content) -> str:
    """JSON-able content as an indented block."""
    return f"<pre class='small'>{html.escape(json.dumps(content, indent=2, ensure_ascii=False))}</pre>"


def figure_of_samples(
    caption: str, images: Sequence[torch.Tensor], alt: str | None = None, *, columns: int = 8, max_bytes: int = 600_000
) -> str:
    """A sheet of images of any sizes: small ones enlarged by whole numbers, large ones reduced until the PNG is small.

    Args:
        caption, alt: plain texts.
        images: uint8 (C, H, W) with 1 or 3 channels, at least one.
        columns: images per row.
        max_bytes: of the PNG; only reached by the smallest thumbnails if there are very many images.
    """
    largest = max(max(image.shape[1:]) for image in images)
    if largest <= _SMALL:
        return figure(caption, sheet(thumbnails(images, _SMALL), columns), alt)
    for edge in _EDGES:
        data = png_bytes(sheet(thumbnails(images, edge), columns))
        if len(data) <= max_bytes:
            break
    return _figure(caption, data, alt, smooth=True)


def thumbnails(images: Sequence[torch.Tensor], edge: int) -> torch.Tensor:
    """Images of any sizes as uint8 (N, C, h, w) with h, w ≤ edge.

    An image that fits is enlarged by the largest whole number, a larger one is reduced with Pillow's Lanczos filter;
    both keep their proportions. Where sizes differ after that, white fills the rest. C is 3 if any image has colour.
    """
    channels = max(image.shape[0] for image in images)
    small = [_fitted(image.cpu(), edge).expand(channels, -1, -1) for image in images]
    height, width = (max(image.shape[axis] for image in small) for axis in (1, 2))
    return torch.stack([_centred(image, height, width) for image in small])


def _fitted(image: torch.Tensor, edge: int) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    height, width = image.shape[1:]
    longer = max(height, width)
    if longer <= edge:
        return image.repeat_interleave(edge // longer, dim=1).repeat_interleave(edge // longer, dim=2)
    size = (max(1, round(width * edge / longer)), max(1, round(height * edge / longer)))
    planes = [Image.fromarray(plane.contiguous().numpy()).resize(size, Image.Resampling.LANCZOS) for plane in image]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))


def _centred(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
    margins = (left, width - image.shape[2] - left, top, height - image.shape[1] - top)
    return functional.pad(image, margins, value=255)


def _figure(caption: str, png: bytes, alt: str | None, smooth: bool) -> str:
    data = base64.b64encode(png).decode()
    alt = html.escape(caption if alt is None else alt)
    kind = " class='smooth'" if smooth else ""
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption>"
        f"<img{kind} alt='{alt}' src='data:image/png;base64,{data}'></figure>"
    )
