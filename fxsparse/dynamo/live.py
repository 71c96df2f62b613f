"""A compiled graph whose packed weights follow the model's own, and the reports of all that are in use.

A weight that an optimizer or `load_state_dict` writes has another version afterwards (torch counts in-place writes),
and one whose `.data` was replaced another address. Both are compared at every call: about 0.1 us a weight.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fxsparse.dynamo.options import Compiled
from fxsparse.dynamo.weights import Weight
from fxsparse.report import Report

log = logging.getLogger(__name__)

_Snapshot = tuple[tuple[int, int, int], ...]  # position among the inputs, address and version of some weights


@dataclasses.dataclass
class Followed:
    """A weight, and what was made of it.

    Attributes:
        weight: computes it.
        positions: of its sources among the inputs of the graph.
        kept: its mask, or None where none of it is pruned.
        dense: a copy in another layout, or computed, or None.
        packed: its packed tensors, or None.
        holds: whether it is still zero where the mask says so.
    """

    weight: Weight
    positions: tuple[int, ...]
    kept: Tensor | None
    dense: Tensor | None
    packed: tuple[Tensor, ...] | None
    holds: bool = True

    def follow(self, inputs: Sequence[Tensor]) -> None:
        """Bring what was made of the weight up to date, in place."""
        value = self.weight.value(*(inputs[i] for i in self.positions))
        self.holds = self.kept is None or not bool(((value != 0) & ~self.kept).any())
        if self.dense is not None:
            self.dense.copy_(value)
        if self.packed is not None:
            values, *tables = self.packed
            values.copy_(torch.ops.fxsparse.repack(value, *tables, values.numel()))


class Record:
    """What became of one graph, for as long as it is in use."""

    def __init__(self, report: Report, parameters: Iterable[Tensor]) -> None:
        """Remember a report and whose it is."""
        self._report = report
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self.lost: tuple[str, ...] = ()
        with _lock:
            _records[:] = [*(known for known in _records if known() is not None), weakref.ref(self)]
        log.info("%s", report)

    def belongs_to(self, model: nn.Module) -> bool:
        """Tell whether the graph reads a parameter or buffer of a model."""
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return any((tensor := parameter()) is not None and id(tensor) in own for parameter in self._parameters)

    @property
    def report(self) -> Report:
        """The report, as things are now."""
        if not self.lost:
            return self._report
        note = f"{_named(self.lost)} not zero any more where it was: the whole graph runs vanilla until it is again."
        rows = tuple(dataclasses.replace(row, path="vanilla", reason=note) for row in self._report.rows)
        return dataclasses.replace(self._report, rows=rows, plan_notes=(*self._report.plan_notes, note))


class LiveGraph:
    """A graph on packed weights that looks at the weights at every call."""

    def __init__(
        self, followed: list[Followed], sparse: Compiled, vanilla: Callable[[], Compiled], record: Record
    ) -> None:
        """Begin with weights that were never seen, so that the first call brings everything up to date.

        Args:
            followed: the weights.
            sparse: the compiled graph that reads what was made of them.
            vanilla: makes the compiled graph that reads the weights themselves, when that is needed.
            record: of the graph.
        """
        self._followed = followed
        self._sparse = self._run = sparse
        self._vanilla = vanilla
        self._made_vanilla: Compiled | None = None
        self._record = record
        self._changing = threading.Lock()
        self._seen: _Snapshot = ((followed[0].positions[0], 0, -1),)
        self._alive: list[Tensor] = []
        with _lock:
            _graphs.add(self)

    def call(self, *inputs: Tensor) -> object:
        """Run the graph on the inputs that Dynamo gives it."""
        for position, address, version in self._seen:
            weight = inputs[position]
            if weight._version != version or weight.data_ptr() != address:
                self._follow(inputs)
                break
        return self._run(*inputs)

    def expire(self) -> None:
        """Let the next call read all weights anew, changed or not."""
        with self._changing:
            self._seen = ((self._followed[0].positions[0], 0, -1),)

    def belongs_to(self, model: nn.Module) -> bool:
        """Tell whether the graph reads a parameter or buffer of a model."""
        return self._record.belongs_to(model)

    def _follow(self, inputs: Sequence[Tensor]) -> None:
        positions = sorted({position for followed in self._followed for position in followed.positions})
        with self._changing, torch.inference_mode(False), torch.no_grad():
            # Taken before the weights are read: a write meanwhile is seen at the next call.
            now = tuple((p, inputs[p].data_ptr(), inputs[p]._version) for p in positions)
            if now == self._seen:  # another thread was faster
                return
            changed = {entry[0] for entry in now} - {entry[0] for entry in now if entry in self._seen}
            for followed in self._followed:
                if changed.intersection(followed.positions):
                    followed.follow(inputs)
            # While these share its memory, no other tensor can come to lie at the same address.
            self._alive = [inputs[p].detach() for p in positions]
            self._choose()
            for device in {inputs[p].device for p in positions}:
                if device.type == "cuda":  # calls on other streams do not wait for this one
                    torch.cuda.current_stream(device).synchronize()
            self._seen = now

    def _choose(self) -> None:
        lost = tuple(followed.weight.name for followed in self._followed if not followed.holds)
        if lost and not self._record.lost:
            log.warning("%s not zero any more where it was: a graph runs vanilla now.", _named(lost))
        self._record.lost = lost
        if lost and self._made_vanilla is None:
            self._made_vanilla = self._vanilla()
        self._run = self._made_vanilla if lost and self._made_vanilla is not None else self._sparse


_lock = threading.Lock()
_records: list[weakref.ref[Record]] = []
_graphs: weakref.WeakSet[LiveGraph] = weakref.WeakSet()


def reports(model: nn.Module | None = None) -> list[Report]:
    """Return what became of the graphs with convolutions that `torch.compile(..., backend="fxsparse")` made.

    Args:
        model: the compiled model, or the one that was compiled; None means every model and function.

    Returns:
        One report a graph, in the order in which they were compiled: several where the model breaks graphs, or was
        compiled again for other inputs. A graph that torch has dropped has none.
    """
    with _lock:
        known = [record for reference in _records if (record := reference()) is not None]
    return [record.report for record in known if model is None or record.belongs_to(model)]


def refresh(model: nn.Module | None = None) -> None:
    """Let compiled graphs read their weights anew at the next call.

    That is needed only after writes that torch does not count: through `.data` (`p.data.mul_(2)`) or through NumPy.

    Args:
        model: the compiled model, or the one that was compiled; None means every model and function.
    """
    with _lock:
        known = list(_graphs)
    for graph in known:
        if model is None or graph.belongs_to(model):
            graph.expire()


def _named(lost: Sequence[str]) -> str:
    return "The weight " + ", ".join(f"'{name}'" for name in lost) + " is"
