"""The demo's net: plain torch code that knows nothing of fxsparse."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

Plan = Sequence["int | str"]
"""Widths of the 3×3 convolutions in order; "M" is a max pooling that halves height and width."""

PLAN: Plan = (32, "M", 64, 128, "M", 128, 256, 256)
QUICK_PLAN: Plan = (16, "M", 32, "M", 64, 64)


class SmallVgg(nn.Module):
    """A small VGG-like net with batch norm for grey images of any size."""

    def __init__(self, plan: Plan = PLAN, classes: int = 10) -> None:
        """Build the layers of a plan."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in plan:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, [N, classes]."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def prunable(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions worth pruning by name: all but the stem, which has hardly any weights."""
    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return dict(convs[1:])
