"""Training and testing of the demo's net."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fxsparse.demo.data import Images

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BATCH = 50
PEAK_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def train(
    model: nn.Module,
    images: Images,
    *,
    epochs: range,
    of: int,
    seed: int,
    label: str = "Training",
    loss: Loss | None = None,
    peak: float = PEAK_RATE,
) -> None:
    """Train some epochs of a cosine schedule, on shifted images.

    Args:
        model: trained in place and left in eval mode.
        images: their training part is used.
        epochs: which epochs of the schedule: after rewinding to the end of epoch 1, `range(1, of)`.
        of: epochs of the whole schedule.
        seed: of batches and shifts; an epoch sees the same ones in every training.
        label: what the progress bar says.
        loss: of (logits, images, labels); None takes the cross-entropy with the labels.
        peak: the largest learning rate.
    """
    measure = loss or (lambda logits, x, y: F.cross_entropy(logits, y))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=peak, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps = math.ceil(len(images.train_x) / BATCH)
    model.train()
    with tqdm(total=len(epochs) * steps, desc=label, unit="step", leave=False, disable=None) as bar:
        for epoch in epochs:
            generator = torch.Generator().manual_seed(1000 * seed + epoch)
            order = torch.randperm(len(images.train_x), generator=generator)
            for step, index in enumerate(torch.split(order, BATCH)):
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate((epoch * steps + step) / (of * steps))
                x = images.shifted(index, generator)
                optimizer.zero_grad()
                measure(model(x), x, images.train_y[index]).backward()
                optimizer.step()
                bar.update()
    model.eval()


def rate(done: float) -> float:
    """Return the share of the peak rate when this share of the schedule is done: a short warm-up, then a cosine."""
    return min(1.0, 0.1 + done / 0.05) * 0.5 * (1 + math.cos(math.pi * done))


def logits_of(model: nn.Module, x: Tensor, batch: int = 64) -> Tensor:
    """Return a model's logits on images, computed batch by batch."""
    with torch.inference_mode():
        return torch.cat([model(part) for part in torch.split(x, batch)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right predictions."""
    return float((logits.argmax(1) == labels).float().mean())
