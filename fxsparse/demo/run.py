"""The demo from start to end: train, prune in rounds, regroup, train again, convert, check, measure."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.arms import channels_last
from fxsparse.demo import data, measure, pruning
from fxsparse.demo.model import PLAN, QUICK_PLAN, Plan, SmallVgg, prunable
from fxsparse.demo.result import (
    CONVERTED,
    Result,
    Stage,
    accuracy_table,
    agreement_line,
    speed_table,
)
from fxsparse.demo.train import accuracy, logits_of, train
from fxsparse.errors import FxsparseError
from fxsparse.timing import Timing

ROUNDS = (0.55, 0.25, 0.10)
BATCHES = (1, 64)
EPOCHS = 5
QUICK_EPOCHS = 5


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user can choose about the demo.

    Attributes:
        data: "mnist", "digits" or "auto".
        epochs: of each training; None takes the data's default.
        seed: of the split, the weights and the batches.
        threads: CPU threads of torch; None leaves them.
        compile: time torch.compile too.
        quick: a tiny net on few images.
    """

    data: str = "auto"
    epochs: int | None = None
    seed: int = 0
    threads: int | None = None
    compile: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.epochs is not None and self.epochs < 2:
            raise FxsparseError(
                f"epochs={self.epochs} is too few: the nets rewind to the end of epoch 1. Give at least 2."
            )
        if self.seed < 0:
            raise FxsparseError(f"seed={self.seed} is negative. Give 0 or more.")
        if self.threads is not None and self.threads < 1:
            raise FxsparseError(f"threads={self.threads} is no number of threads. Give at least 1.")


def run(options: Options) -> Result:
    """Run the demo and print what it finds.

    Raises:
        FxsparseError: there are no images.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        return _Demo(options).run()
    finally:
        torch.set_num_threads(before)


class _Demo:
    """The state of one run: images, models and what was measured of them so far."""

    def __init__(self, options: Options) -> None:
        self.start = time.perf_counter()
        self.options = options
        self.quick = options.quick
        limits = {"train": 600, "test": 200} if self.quick else {}
        self.images = data.load(options.data, options.seed, **limits)
        self.test_x = self.images.centred()
        self.plan: Plan = QUICK_PLAN if self.quick else PLAN
        self.epochs = options.epochs or (QUICK_EPOCHS if self.quick else EPOCHS)
        self.early: pruning.State = {}
        self.stages: list[Stage] = []
        self.notes: list[str] = []

    def run(self) -> Result:
        facts = self._introduce()
        dense = self._train_dense()
        unstructured, masks = self._prune_in_rounds(dense)
        regrouped, new_masks = self._regroup(unstructured, masks)
        pairs = {CONVERTED[0]: (unstructured, masks), CONVERTED[1]: (regrouped, new_masks)}
        converted = self._convert(pairs)
        agreements = [
            measure.compare(f"'{name}' for batch {batch}", pairs[name][0], model, self.test_x)
            for batch, models in converted.items()
            for name, model in models.items()
        ]
        print(f"\n{accuracy_table(self.stages)}\n")
        for agreement in agreements:
            print(agreement_line(agreement))
        times = {batch: self._time(batch, dense, regrouped, models) for batch, models in converted.items()}
        print(f"\n{speed_table(times)}\n")
        print("Times are medians of interleaved calls, with quartiles; speed is against the fastest dense row.")
        print("The converted models run in channels_last too.")
        for note in self.notes:
            print(f"Note: {note}")
        for batch, models in converted.items():
            print(f"\nReport of '{CONVERTED[1]}' for batch {batch}:\n{models[CONVERTED[1]].report}")
        reports: dict[int, dict[str, dict[str, Any]]] = {
            batch: {name: _report_of(model).to_dict() for name, model in models.items()}
            for batch, models in converted.items()
        }
        seconds = time.perf_counter() - self.start
        print(f"\nThe demo took {seconds:.0f} s.")
        return Result(facts, self.stages, agreements, times, reports, self.notes, seconds)

    def _introduce(self) -> dict[str, Any]:
        kernels = fxsparse.capabilities().cpu
        weights = sum(conv.weight.numel() for conv in prunable(SmallVgg(self.plan)).values())
        facts = {
            "data": self.images.name,
            "train_images": len(self.images.train_x),
            "test_images": len(self.images.test_x),
            "net": "-".join(map(str, self.plan)),
            "prunable_weights": weights,
            "epochs": self.epochs,
            "seed": self.options.seed,
            "threads": torch.get_num_threads(),
            "kernels": kernels,
            "torch": torch.__version__,
            "fxsparse": fxsparse.__version__,
        }
        print(
            f"{self.images.name}: {facts['train_images']} to train on, {facts['test_images']} to test on. "
            f"Net: {facts['net']}, {weights:,} prunable weights.\n"
            f"torch {torch.__version__}, threads: {facts['threads']}, kernels: {kernels}."
        )
        if kernels == "reference":
            self.notes.append("The compiled operators are not built: the sparse paths are exact here, but not fast.")
        return facts

    def _train_dense(self) -> SmallVgg:
        start = time.perf_counter()
        torch.manual_seed(self.options.seed)
        model = SmallVgg(self.plan)
        self._train(model, range(1), "Dense net")
        self.early = pruning.snapshot(model)
        self._train(model, range(1, self.epochs), "Dense net")
        self._add_stage("dense", model, 1.0, start)
        return model

    def _prune_in_rounds(self, dense: SmallVgg) -> tuple[SmallVgg, dict[str, Tensor]]:
        """Prune a copy of the dense net in rounds, each rewound to the end of epoch 1 and trained again."""
        model = self._fresh()
        pruning.rewind(model, dense.state_dict())
        masks: dict[str, Tensor] = {}
        for number, share in enumerate(ROUNDS, 1):
            start = time.perf_counter()
            pruning.prune_to(model, share)
            masks = pruning.masks_of(model)
            pruning.rewind(model, self.early)
            self._train(model, range(1, self.epochs), f"Pruning round {number}")
            self._add_stage(f"pruned, round {number}", model, pruning.kept_share(masks), start)
        pruning.finish(model)
        return model, masks

    def _regroup(self, pruned: SmallVgg, masks: dict[str, Tensor]) -> tuple[SmallVgg, dict[str, Tensor]]:
        """Replace the masks by blocks of the same area, rewind and train again."""
        start = time.perf_counter()
        weights = {name: conv.weight.detach() for name, conv in prunable(pruned).items()}
        new_masks = fxsparse.regroup_masks(masks, weights=weights, progress=sys.stderr.isatty())
        model = self._fresh()
        pruning.prune_by(model, new_masks)
        pruning.rewind(model, self.early)
        self._train(model, range(1, self.epochs), "Regrouped net")
        self._add_stage("regrouped, trained again", model, pruning.kept_share(new_masks), start)
        pruning.finish(model)
        return model, new_masks

    def _convert(self, pairs: dict[str, tuple[SmallVgg, dict[str, Tensor]]]) -> dict[int, dict[str, nn.Module]]:
        """Convert both pruned nets, which keeps their masks, and calibrate them for each batch size."""
        terminal = sys.stderr.isatty()
        settings = fxsparse.Settings(cache=False, progress=terminal)  # nothing is left on the user's disk
        converted: dict[int, dict[str, nn.Module]] = {batch: {} for batch in BATCHES}
        for name, (model, masks) in pairs.items():
            start = time.perf_counter()
            fast = fxsparse.convert(channels_last(model), masks, settings=settings)
            for batch in BATCHES:
                x = self.test_x[:batch].to(memory_format=torch.channels_last)
                converted[batch][name] = fxsparse.calibrate(copy.deepcopy(fast), x, progress=terminal)
            self._add_stage(name, converted[BATCHES[-1]][name], pruning.kept_share(masks), start)
        return converted

    def _time(
        self, batch: int, dense: SmallVgg, masked: SmallVgg, converted: dict[str, nn.Module]
    ) -> dict[str, Timing]:
        x = self.test_x[:batch]
        arms = measure.arms(dense, masked, x)
        if self.options.compile:
            arm, refusal = measure.compiled_arm(masked, x)
            if arm is None:
                self.notes.append(f"Batch {batch}: {refusal}")
            else:
                arms["masked, torch.compile"] = arm
        x_last = x.to(memory_format=torch.channels_last)
        for name, model in converted.items():
            arms[name] = lambda model=model: model(x_last)  # type: ignore[misc]
        return measure.speed(arms, budget_s=0.3 if self.quick else 4.0)

    def _fresh(self) -> SmallVgg:
        return SmallVgg(self.plan)

    def _train(self, model: SmallVgg, epochs: range, label: str) -> None:
        train(model, self.images, epochs=epochs, of=self.epochs, seed=self.options.seed, label=label)

    def _add_stage(self, name: str, model: nn.Module, kept: float, start: float) -> None:
        right = accuracy(logits_of(model, self.test_x), self.images.test_y)
        stage = Stage(name, kept, right, time.perf_counter() - start)
        self.stages.append(stage)
        print(f"{name}: {kept:.1%} of the weights, accuracy {right:.2%} ({stage.seconds:.1f} s)", flush=True)


def _report_of(model: nn.Module) -> fxsparse.Report:
    """Return the report of a converted model."""
    report = model.report
    assert isinstance(report, fxsparse.Report)
    return report
