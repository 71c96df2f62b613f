"""Pruning in rounds around the user's own training loop, with rewinding, and with checkpoints to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import FxsparseError
from fxsparse.pruning import checkpoint, ranks
from fxsparse.pruning.holding import Held, hold
from fxsparse.pruning.layers import Masks, checked, conv_layers, dense_masks
from fxsparse.pruning.rules import After, Rule

State = dict[str, Tensor]


class Round:
    """One round: the model as it is to be trained now.

    Attributes:
        number: 0 for the dense model, then 1, 2, ...
        masks: by module name; held on the model.
    """

    def __init__(self, rounds: Rounds, number: int, masks: Masks, saved: Mapping[str, Any]) -> None:
        """Remember what a checkpoint of this round holds."""
        self.number = number
        self.masks = masks
        self._rounds = rounds
        self._saved = saved

    def restore(self, **objects: Any) -> dict[str, Any]:
        """Bring the optimizer and whatever else has a state to where the checkpoint left them.

        Call it once in every round, when all of these exist: it sets the random number generators, too.

        Args:
            objects: by the names that `save` gets them under, with `load_state_dict`.

        Returns:
            The progress that `save` was given last in this round, {} at its start.
        """
        for name, thing in objects.items():
            if name in self._saved["objects"]:
                thing.load_state_dict(self._saved["objects"][name])
        states = self._saved["random"]
        if ranks.rank() < len(states):
            checkpoint.set_random_state(states[ranks.rank()])
        progress: dict[str, Any] = self._saved["progress"]
        return dict(progress)

    def save(self, progress: Mapping[str, Any], **objects: Any) -> None:
        """Write a checkpoint, if the rounds have a file; every rank must call it, rank 0 writes.

        Args:
            progress: plain values that say where the training is, for `restore`.
            objects: what has a `state_dict`: optimizer, scheduler, a gradient scaler; by name.
        """
        self._rounds._write(self.number, progress, {name: thing.state_dict() for name, thing in objects.items()})

    def mark(self) -> None:
        """Make the weights of now what later rounds rewind to; in round 0, before or early in the training."""
        if self.number:
            raise FxsparseError("mark() belongs into round 0: later rounds have rewound already.")
        self._rounds._mark()


class Rounds:
    """Train, prune, rewind, and again.

        rounds = Rounds(model, Magnitude(0.2), 10, after=Regroup(), file="run.safetensors")
        for round in rounds:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
            start = round.restore(optimizer=optimizer)
            for epoch in range(start.get("epoch", 0), 160):
                if round.number == 0 and epoch == 16:
                    round.mark()
                train_one_epoch(model, optimizer)
                round.save({"epoch": epoch + 1}, optimizer=optimizer)

    Killed anywhere, the same program goes on from the file and comes to the same result.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        count: int,
        *,
        after: After | None = None,
        rewind: bool = True,
        trained: bool = False,
        early: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Any] | None = None,
        file: str | Path | None = None,
        include: tuple[str, ...] = ("*",),
        exclude: tuple[str, ...] = (),
    ) -> None:
        """Prepare the rounds; where the file exists, go on from it.

        Args:
            model: trained by the user's loop, pruned in place. Not a DistributedDataParallel, but what it wraps.
            rule: what prunes in each round, as `Magnitude`.
            count: number of rounds that prune.
            after: what is made of the masks of each, as `Regroup` or `Refill`.
            rewind: put the early weights back before each round; False goes on from the trained weights, and only
                weights that `after` brought back get their early values.
            trained: the model is trained: there is no round 0.
            early: a state dict to rewind to; None takes the model's now, or what `Round.mark` marks.
            masks: to start from, by module name; None keeps everything.
            file: the checkpoint, a safetensors file; None writes none.
            include, exclude: names of the layers to prune, as in `fxsparse.Settings`.

        Raises:
            FxsparseError: an argument cannot be, or the file is of another run.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise FxsparseError("The model is a DistributedDataParallel. Give the model that it wraps: its `.module`.")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise FxsparseError(f"count={count!r} is no number of rounds. Give at least 1.")
        self._model, self._rule, self._after, self._rewind = model, rule, after, rewind
        self._count = count
        self._file = None if file is None else Path(file)
        layers = conv_layers(model, include, exclude)
        self.masks: Masks = dense_masks(layers) | checked(model, masks or {})
        self._early = _snapshot(model) if early is None else {k: v.detach().cpu().clone() for k, v in early.items()}
        _check_state(model, self._early)
        self._number = 1 if trained else 0
        self._trained = trained
        self._settings = {
            "rule": repr(rule),
            "after": repr(after),
            "count": count,
            "rewind": rewind,
            "trained": trained,
            "layers": list(self.masks),
        }
        self._saved: dict[str, Any] | None = None
        if self._file is not None and self._file.exists():
            self._load(self._file)

    def __iter__(self) -> Iterator[Round]:
        """Yield the rounds that are left; between two, prune and rewind."""
        held: Held | None = None
        try:
            while self._number <= self._count:
                resumed, self._saved = self._saved, None
                if resumed is None:
                    if self._number:
                        if held is not None:
                            held.release()
                        self._prune()
                    self._write(self._number, {}, {})
                    saved: dict[str, Any] = {"objects": {}, "progress": {}, "random": [checkpoint.random_state()]}
                    if not ranks.is_alone():
                        saved["random"] = ranks.gathered_json(checkpoint.random_state())
                else:
                    saved = resumed
                held = hold(self._model, self.masks)
                yield Round(self, self._number, held.masks, saved)
                self._number += 1
            self._write(self._number, {}, {})
        finally:
            if held is not None:
                held.release()

    def _prune(self) -> None:
        """Choose the masks of this round and bring the weights to where it starts."""
        before = self.masks
        chosen = self._rule.masks(self._model, before, self._number)
        if self._after is not None:
            chosen = self._after.masks(self._model, chosen)
        self.masks = ranks.from_first(checked(self._model, chosen))
        with torch.no_grad():
            state = self._model.state_dict()
            if self._rewind:
                for name, value in state.items():
                    value.copy_(self._early[name])
            else:
                for name, mask in self.masks.items():
                    key = f"{name}.weight" if f"{name}.weight" in state else name
                    back = mask & ~before[name]
                    state[key][back] = self._early[key].to(state[key].device)[back]

    def _mark(self) -> None:
        self._early = _snapshot(self._model)

    def _write(self, number: int, progress: Mapping[str, Any], objects: dict[str, Any]) -> None:
        if self._file is None:
            return
        states = ranks.gathered_json(checkpoint.random_state())
        if ranks.rank() == 0:
            values = {
                "settings": self._settings,
                "number": number,
                "progress": dict(progress),
                "objects": objects,
                "model": dict(self._model.state_dict()),
                "early": self._early,
                "masks": self.masks,
                "random": states,
            }
            checkpoint.write(self._file, values)
        ranks.wait()

    def _load(self, file: Path) -> None:
        values = checkpoint.read(file)
        for name, now in self._settings.items():
            then = values["settings"].get(name)
            if then != now:
                raise FxsparseError(
                    f"The checkpoint '{file}' is of another run: its {name} is {then}, and this one's {now}. Name "
                    "another file, or remove this one to start again."
                )
        self._model.load_state_dict(values["model"])
        self._early = values["early"]
        self._number = values["number"]
        self.masks = checked(self._model, values["masks"])
        if self._number <= self._count:
            self._saved = {key: values[key] for key in ("objects", "progress", "random")}


def _snapshot(model: nn.Module) -> State:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        if name not in state or state[name].shape != value.shape:
            raise FxsparseError(
                f"The early state has no '{name}' of shape {tuple(value.shape)}. Give a state dict of the same model."
            )
