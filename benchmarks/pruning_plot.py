"""Draws the pictures of `docs/pruning.md` from the numbers in `docs/data`: SVG, written by hand, without a library."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 206, 34, 48
# Told apart by colour-blind readers (Okabe & Ito), and by their marks.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
MARKS = ("circle", "square", "triangle", "diamond", "circle", "square", "triangle")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a picture.

    Attributes:
        name: for the legend.
        points: (x, y, lowest y, highest y).
        style: number of its colour and mark; None takes its place among the lines.
    """

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    style: int | None = None


def plot(title: str, x_name: str, y_name: str, lines: Sequence[Line], level: tuple[str, float] | None) -> str:
    """Return a picture with a logarithmic x axis as SVG.

    Args:
        title: above it.
        x_name, y_name: of the axes.
        lines: what is drawn.
        level: a name and a height to draw a dashed line at, or None.
    """
    xs = [x for line in lines for x, *_ in line.points]
    ys = [y for line in lines for _, _, low, high in line.points for y in (low, high)]
    ys += [level[1]] if level else []
    x_low, x_high = math.log(min(xs) / 1.08), math.log(max(xs) * 1.08)
    y_low, y_high = min(ys), max(ys)
    y_low, y_high = y_low - 0.04 * (y_high - y_low), y_high + 0.06 * (y_high - y_low)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for y in ticks(y_low, y_high):
        _, v = place(math.exp(x_low), y)
        parts.append(f'<path d="M{LEFT} {v:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks(math.exp(x_low), math.exp(x_high)):
        u, _ = place(x, y_low)
        parts.append(f'<path d="M{u:.1f} {TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{u:.1f}" y="{bottom + 17}" text-anchor="middle">{x:g}x</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#222"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>')
    half = (TOP + bottom) / 2
    parts.append(
        f'<text x="14" y="{half}" text-anchor="middle" transform="rotate(-90 14 {half})">{escape(y_name)}</text>'
    )
    if level:
        _, v = place(math.exp(x_low), level[1])
        parts.append(f'<path d="M{LEFT} {v:.1f}H{right}" stroke="#222" stroke-dasharray="5 4"/>')
        height = TOP + 40 + 20 * len(lines)
        parts.append(f'<path d="M{right + 8} {height - 4}h16" stroke="#222" stroke-dasharray="5 4"/>')
        parts.append(f'<text x="{right + 28}" y="{height}">{escape(level[0])}</text>')
    for number, line in enumerate(lines):
        style = number if line.style is None else line.style
        colour, mark = COLOURS[style % len(COLOURS)], MARKS[style % len(MARKS)]
        places = [place(x, y) for x, y, _, _ in line.points]
        if len(places) > 1:
            path = "L".join(f"{u:.1f} {v:.1f}" for u, v in places)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        for (u, v), (x, _, low, high) in zip(places, line.points, strict=True):
            if high > low:
                parts.append(f'<path d="M{u:.1f} {place(x, low)[1]:.1f}V{place(x, high)[1]:.1f}" stroke="{colour}"/>')
            parts.append(_mark(mark, u, v, colour))
        height = TOP + 40 + 20 * number
        parts.append(_mark(mark, right + 16, height - 4, colour))
        parts.append(f'<text x="{right + 28}" y="{height}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two, four to nine of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) < 8)
    first = math.ceil(low / step)
    return [round(step * i, 10) for i in range(first, math.floor(high / step) + 1)]


def x_ticks(low: float, high: float) -> list[float]:
    """Return round factors between two, at least three."""
    fine = [m * 10.0**e for e in range(-2, 3) for m in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
    inside = [round(x, 6) for x in fine if low <= x <= high]
    return inside if len(inside) <= 9 else [x for x in inside if f"{x:e}"[0] in "1235" and f"{x:e}"[2] == "0"]


def _mark(kind: str, u: float, v: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{u:.1f}" cy="{v:.1f}" r="4" fill="{colour}"/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
    }[kind]
    path = "L".join(f"{u + x:.1f} {v + y:.1f}" for x, y in corners)
    return f'<path d="M{path}Z" fill="{colour}"/>'


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw every picture whose numbers are there."""
    drawn = []
    for name, make in (("mnist", _mnist), ("ffdnet", _ffdnet), ("efficientnet", _efficientnet)):
        source = DOCS / "data" / f"pruning_{name}.json"
        if not source.exists():
            print(f"{source} is not there.")
            continue
        for file, picture in make(json.loads(source.read_text())).items():
            path = DOCS / "images" / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(picture)
            drawn.append(str(path))
            print(f"Drew {path}.")
    return {"drawn": drawn}


_NAMES = {
    "imp": "unstructured",
    "refill": "refill",
    "paper": "paper's regroup",
    "ours": "ours, rewinding",
    "ours, no rewind": "ours, going on",
    "ours, no training": "ours, no training",
    "ours, distilled": "ours, distilled",
}


SPEED = "measured speed against the best dense run"
FEWER = "how many times fewer multiply-adds"


def _mnist(numbers: dict[str, Any]) -> dict[str, str]:
    pictures = {}
    for net, title in (("vgg", "VGG-like net"), ("resnet", "ResNet-like net")):
        groups = [group for group in numbers["groups"] if group["net"] == net]
        dense = [cell["test"] for group in groups if group["method"] == "dense" for cell in group["cells"]]
        for what in ("macs", "batch 64", "batch 1"):
            lines = []
            for style, (method, name) in enumerate(_NAMES.items()):
                points = []
                for group in groups:
                    cells = group["cells"]
                    tests = [cell["test"] for cell in cells]
                    xs = [1 / c["macs"] for c in cells] if what == "macs" else _speeds(cells, what)
                    if group["method"] == method and xs and statistics.mean(tests) > 93:
                        points.append((statistics.mean(xs), statistics.mean(tests), min(tests), max(tests)))
                if points:
                    lines.append(Line(name, tuple(sorted(points)), style))
            if lines:
                x_name = FEWER if what == "macs" else f"{SPEED}, {what}"
                picture = plot(f"MNIST, {title}", x_name, "test accuracy, %", lines, ("dense", statistics.mean(dense)))
                pictures[f"pruning_mnist_{net}_{what.replace(' ', '')}.svg"] = picture
    return pictures


def _speeds(cells: list[dict[str, Any]], key: str) -> list[float]:
    return [cell[key]["speed"] for cell in cells if key in cell]


def _ffdnet(numbers: dict[str, Any]) -> dict[str, str]:
    dense = next(cell for cell in numbers["cells"] if cell["method"] == "dense")
    steps = max(int(key.split()[1]) for cell in numbers["cells"] for key in cell if key.startswith("steps"))
    pictures = {}
    for what in ("macs", "time"):
        lines = []
        for method, name in (("unstructured", "unstructured"), ("paper", "paper's regroup"), ("ours", "ours")):
            for kind, said in (("fitted", "fitted"), (f"steps {steps}", f"{steps} steps")):
                points = []
                for cell in numbers["cells"]:
                    if cell["method"] == method and kind in cell and (what == "macs" or "time" in cell):
                        x = 1 / cell["macs"] if what == "macs" else cell["time"]["speed"]
                        points.append((x, cell[kind], cell[kind], cell[kind]))
                if points:
                    lines.append(Line(f"{name}, {said}", tuple(sorted(points))))
        if lines:
            x_name = FEWER if what == "macs" else SPEED
            level = ("dense, as published", dense["fitted"])
            picture = plot("FFDNet, sigma 25, held-out photos", x_name, "PSNR, dB", lines, level)
            pictures[f"pruning_ffdnet_{'macs' if what == 'macs' else 'speed'}.svg"] = picture
    return pictures


def _efficientnet(numbers: dict[str, Any]) -> dict[str, str]:
    pictures = {}
    for what in ("macs", "time"):
        lines = []
        for method, name in (("ours", "ours, no training"), ("energy", "same masks, no fit")):
            points = []
            for cell in numbers["cells"]:
                if cell["method"] == method and (what == "macs" or "time" in cell):
                    x = 1 / cell["budget"] if what == "macs" else cell["time"]["speed"]
                    points.append((x, *(3 * [100 * cell["agreement"]])))
            if len(points) > 1:  # a single one makes no picture
                lines.append(Line(name, tuple(sorted(points))))
        if lines:
            x_name = FEWER if what == "macs" else SPEED
            title = "EfficientNet-Lite0, pruned without training"
            picture = plot(title, x_name, "same top class as dense, %", lines, None)
            pictures[f"pruning_efficientnet_{'macs' if what == 'macs' else 'speed'}.svg"] = picture
    return pictures
