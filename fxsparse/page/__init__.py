"""The report as one HTML page that needs no network: `report.html` with its style, script and data inside."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import struct
import zlib
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from fxsparse.pictures import Cells, WeightPicture

if TYPE_CHECKING:
    from fxsparse.report import Report

# One colour for both themes: a cell's density is its opacity over the page's own background.
_INK = (58, 128, 224)
_SHADES = 16
# A cell takes about half a byte in the page, so that all the pictures together stay below 4 MB.
_ALL_CELLS = 8_000_000
_TABLE_HEAD = ("convolution", "path", "vanilla ms", "sparse ms", "why")


def render(report: Report) -> str:
    """Return the report as the text of an HTML page.

    The page refers to nothing outside itself. However large the model, it stays below about 5 MB: with more than
    about 100 pictures, each is drawn with fewer cells.
    """
    pictured = sum(row.picture is not None for row in report.rows)
    values = report.to_dict()
    values["rows"] = [
        {**fields, "picture": None if row.picture is None else _picture(row.picture, _ALL_CELLS // pictured)}
        for fields, row in zip(values["rows"], report.rows, strict=True)
    ]
    parts = {
        "style": _source("report.css"),
        "script": _source("report.js"),
        "data": _embedded(values),
        "table": _table(report),
    }
    # One sweep, so that a name that looks like a placeholder stays a name.
    return re.sub("@@(style|script|data|table)@@", lambda match: parts[match[1]], _source("report.html"))


def _source(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _embedded(values: Any) -> str:
    """Return JSON that may stand inside a script element, whatever the names in it are."""
    text = json.dumps(_finite(values), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold, NaN and infinity, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _table(report: Report) -> str:
    """Return the rows as an HTML table, for a browser that runs no scripts."""
    rows = [[row.name, row.path, _ms(row.vanilla_ms), _ms(row.sparse_ms), row.reason] for row in report.rows]
    head = "".join(f"<th>{title}</th>" for title in _TABLE_HEAD)
    body = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _escaped(text: str) -> str:
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode("ascii")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _picture(picture: WeightPicture, cells: int) -> dict[str, Any]:
    """Return a picture as JSON values: two PNG data URIs and the outlines in 1/10000 of the size."""
    step = max(1, math.ceil(math.sqrt(picture.before.size * 2 / cells)))
    height, width = picture.before.shape
    return {
        "before": _png(_coarser(picture.before, step)),
        "after": _png(_coarser(picture.after, step)),
        "outlines": [[round(side * 10_000) for side in outline] for outline in picture.outlines],
        "rows": picture.rows,
        "columns": picture.columns,
        "height": -(-height // step),
        "width": -(-width // step),
    }


def _coarser(cells: Cells, step: int) -> Cells:
    """Return the means of ``step`` x ``step`` cells; those of the last row and column may be of fewer."""
    if step == 1:
        return cells
    height, width = cells.shape
    tops, lefts = np.arange(0, height, step), np.arange(0, width, step)
    total = np.add.reduceat(np.add.reduceat(cells, tops, axis=0, dtype=np.int64), lefts, axis=1)
    area = np.outer(np.diff(tops, append=height), np.diff(lefts, append=width))
    means: Cells = (-(-total // area)).astype(np.uint8)
    return means


def _png(cells: Cells) -> str:
    """Return densities [h, w] as the data URI of a PNG: 16 shades of one colour, from transparent to opaque."""
    height, width = cells.shape
    # Bent towards the sparse end, where a weight matrix lives; any kept weight makes at least shade 1.
    shades = np.rint((cells / 255) ** 0.65 * (_SHADES - 1)).astype(np.uint8)
    shades = np.maximum(shades, cells > 0)
    pairs = np.pad(shades, ((0, 0), (0, width % 2)))
    packed = (pairs[:, ::2] << 4 | pairs[:, 1::2]).astype(np.uint8)
    lines = np.pad(packed, ((0, 0), (1, 0)))  # each line starts with its filter, 0 = none
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)),  # 4 bits, palette
        (b"PLTE", bytes(_INK * _SHADES)),
        (b"tRNS", bytes(round(255 * shade / (_SHADES - 1)) for shade in range(_SHADES))),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
