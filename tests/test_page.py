"""The report's page as text: what is in it, what cannot get out of it, how large it grows."""

import base64
import html.parser
import json
import math
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch

import fxsparse
from fxsparse import page
from fxsparse.pictures import WeightPicture, picture
from fxsparse.report import Report, Row


def _report(*rows: Row, **fields: Any) -> Report:
    return Report(**{"rows": rows, "rung": "symbolic", "refused": {}, "notes": (), **fields})


def _row(name: str = "conv", **fields: Any) -> Row:
    return Row(**{"name": name, "reason": "no zeros in the weight", **fields})


def _data(text: str) -> dict[str, Any]:
    """Read the embedded JSON as a browser does: up to the first end tag."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)[1])


def _picture(rows: int = 40, columns: int = 90) -> WeightPicture:
    mask = torch.rand(rows, columns) < 0.2
    return picture(mask.numpy(), fxsparse.regroup(mask))


def _decode(uri: str) -> tuple[np.ndarray, bytes]:
    """Return the palette indices and the opacities of a PNG data URI."""
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length)[0] == zlib.crc32(kind + content)
        chunks[kind] = content
        at += length + 12
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    nibbles = np.stack([lines[:, 1:] >> 4, lines[:, 1:] & 15], axis=2).reshape(height, -1)[:, :width]
    return nibbles, chunks[b"tRNS"]


class _Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_holds_the_report() -> None:
    report = _report(_row("features.0", vanilla_ms=0.25, vanilla_ci=(0.24, 0.26)), notes=("a note",))
    data = _data(page.render(report))
    assert data["rows"][0]["name"] == "features.0"
    assert data["rows"][0]["vanilla_ci"] == [0.24, 0.26]
    assert data["rows"][0]["picture"] is None
    assert data["notes"] == ["a note"]


def test_the_page_refers_to_nothing_outside_itself() -> None:
    text = page.render(_report(_row(picture=_picture())))
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"@import|url\(", text)
    for tag, attributes in _Tags(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    assert "default-src 'none'" in text


@pytest.mark.parametrize("name", ["</script><b>", "<!--<script>", "a&amp;b", "@@data@@", "\u2028'\"\\", "\ud800"])
def test_no_name_breaks_out_of_the_data(name: str) -> None:
    text = page.render(_report(_row(name, reason=name), notes=(name,), environment={name: name}))
    text.encode("utf-8")
    data = _data(text)
    assert data["rows"][0]["name"] == data["rows"][0]["reason"] == data["notes"][0] == name
    assert data["environment"] == {name: name}
    plain = [tag for tag, _ in _Tags(page.render(_report(_row()))).tags]
    assert [tag for tag, _ in _Tags(text).tags] == plain


def test_an_empty_report_renders() -> None:
    assert _data(page.render(_report()))["rows"] == []


def test_rows_that_know_nothing_render() -> None:
    text = page.render(_report(_row(), _row("other", path="sparse")))
    assert [row["vanilla_ms"] for row in _data(text)["rows"]] == [None, None]
    assert "<td>-</td>" in text


def test_a_number_that_json_lacks_becomes_unknown() -> None:
    data = _data(page.render(_report(_row(vanilla_ms=math.nan, vanilla_ci=(0.1, math.inf)))))
    assert data["rows"][0]["vanilla_ms"] is None
    assert data["rows"][0]["vanilla_ci"] == [0.1, None]


def test_without_scripts_there_is_a_table() -> None:
    text = page.render(_report(_row("<conv>", vanilla_ms=0.25, reason="a & b")))
    table = re.search(r"<noscript>(.*?)</noscript>", text, re.S)[1]
    assert "<td>&lt;conv&gt;</td><td>vanilla</td><td>0.250</td><td>-</td><td>a &amp; b</td>" in table


def test_a_picture_becomes_a_png_of_its_densities() -> None:
    cells = np.array([[0, 1, 255], [26, 128, 0]], dtype=np.uint8)
    drawn = WeightPicture(cells, cells[::-1], ((0.0, 0.25, 0.5, 1.0),), 2, 3)
    data = _data(page.render(_report(_row(picture=drawn))))["rows"][0]["picture"]
    before, opacity = _decode(data["before"])
    after, _ = _decode(data["after"])
    assert before.tolist() == [[0, 1, 15], [3, 10, 0]]
    assert np.array_equal(after, before[::-1])
    assert opacity[0] == 0 and opacity[15] == 255 and sorted(opacity) == list(opacity)
    assert data["outlines"] == [[0, 2500, 5000, 10_000]]
    assert (data["rows"], data["columns"], data["height"], data["width"]) == (2, 3, 2, 3)


def test_five_hundred_large_pictures_stay_below_five_megabytes() -> None:
    drawn = _picture(640, 1200)
    text = page.render(_report(*(_row(f"layer{i}.conv", picture=drawn) for i in range(500))))
    assert len(text.encode()) < 5_000_000
    shown = _data(text)["rows"][0]["picture"]
    before, _ = _decode(shown["before"])
    assert before.shape == (shown["height"], shown["width"])
    assert shown["width"] >= 60


def test_one_layer_called_twice_keeps_both_rows() -> None:
    assert len(_data(page.render(_report(_row("conv"), _row("conv"))))["rows"]) == 2
