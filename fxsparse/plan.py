"""Plans: what calibration decided, for which device, dtype, input shapes and deployment, and what it measured there.

A plan is data: it is saved as JSON, merged with others, and used again where its measurements hold.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import platform
import re
import secrets
from pathlib import Path
from typing import Any

import torch

import fxsparse
from fxsparse import json_values
from fxsparse.errors import FxsparseError

PATHS = ("vanilla", "sparse")
LAYOUTS = ("contiguous", "channels_last")
PACKINGS = ("blocks", "rows")
DEPLOYMENTS = ("eager", "compiled", "graph")

VERSION = 1
"""Of the JSON form. Raise this when a field is added, removed or changes its meaning."""

_FORMAT = "fxsparse plan"
_REMEDY = "Calibrate the model again and save the new plan."
_CPU_NAME = re.compile(r" x\d+ threads$")  # ends the names of CPUs, see `device_name`

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """How one conv site runs.

    Attributes:
        path: one of PATHS.
        layout: the layout of its output, one of LAYOUTS; None is the one that comes of itself.
        packing: one of PACKINGS.
        input_shape, output_shape: of the site's input and output when it was measured, or None.
        vanilla_ms, sparse_ms: median times of one call in milliseconds, or None where not measured.
        vanilla_ci, sparse_ci: their 95 % confidence intervals, or None.
        bound_ms: roofline bound of the chosen path there, in milliseconds, or None.
        reason: why it has this path.
    """

    path: str
    layout: str | None = None
    packing: str = "blocks"
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    vanilla_ms: float | None = None
    vanilla_ci: tuple[float, float] | None = None
    sparse_ms: float | None = None
    sparse_ci: tuple[float, float] | None = None
    bound_ms: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Move:
    """A change of layout of a value before some of its readers.

    Attributes:
        graph: name prefix of the graph in the model, "" for the whole model.
        value: the fx node whose value changes its layout.
        layout: the layout that the readers get, one of LAYOUTS.
        readers: the fx nodes that read the moved value; all others read the original.
    """

    graph: str
    value: str
    layout: str
    readers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PlanKey:
    """Where a plan's measurements hold.

    Attributes:
        device: its name, as `device_name` gives it.
        dtype: of the computation, as in "float32".
        shapes: of the tensor inputs, in the order of the call.
        deploy: how the model runs, one of DEPLOYMENTS.
    """

    device: str
    dtype: str
    shapes: tuple[Shape, ...]
    deploy: str


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """What one calibration decided.

    Attributes:
        key: where it was measured.
        sites: by site key, how the site runs.
        moves: changes of layout between the sites.
        model_vanilla_ms, model_ms: median times of the whole model in milliseconds, every site vanilla and as
            planned, or None.
        environment: what the times depend on besides the key, as `environment` gives it.
        notes: what its reader should know, one sentence each.
    """

    key: PlanKey
    sites: dict[str, SitePlan]
    moves: tuple[Move, ...] = ()
    model_vanilla_ms: float | None = None
    model_ms: float | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decisions of any number of calibrations, one entry a key."""

    entries: tuple[PlanEntry, ...] = ()

    def merged(self, other: Plan) -> Plan:
        """Return the entries of both plans, the other's last; where both have a key, the other's, the newer one."""
        newer = {entry.key for entry in other.entries}
        return Plan((*(entry for entry in self.entries if entry.key not in newer), *other.entries))

    def exact(self, key: PlanKey) -> PlanEntry | None:
        """Return the entry of a key, or None."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def nearest(self, key: PlanKey) -> tuple[PlanEntry, tuple[str, ...]]:
        """Return the entry that was measured under the most similar conditions.

        What counts, in this order: the same device, the same type of device, the same dtype, the same deployment, as
        many inputs of as many dimensions, and the nearest shapes. Ties go to the smaller shapes.

        Returns:
            The entry and a warning, one sentence, for each condition that differs (other versions too).

        Raises:
            FxsparseError: the plan has no entries.
        """
        if not self.entries:
            raise FxsparseError("The plan has no entries. Calibrate the model first: fxsparse.calibrate fills it.")
        entry = min(self.entries, key=lambda candidate: _difference(candidate.key, key))
        return entry, tuple(_warnings(entry, key))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": _FORMAT, "version": VERSION, "entries": [dataclasses.asdict(e) for e in self.entries]}

    @staticmethod
    def from_dict(values: Any, source: str = "The plan") -> Plan:
        """Read what `to_dict` returned.

        Args:
            values: JSON values, from any source.
            source: begins the message of an error; a file's name, for example.

        Raises:
            FxsparseError: this is not a plan, or one that a newer version wrote, or some value in it cannot be.
        """
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise FxsparseError(f"{source} holds no plan of fxsparse: its 'format' is not '{_FORMAT}'. {_REMEDY}")
        version = values.get("version")
        if type(version) is int and version > VERSION:
            raise FxsparseError(
                f"{source} was written by a newer fxsparse (format version {version}; this one reads up to {VERSION}). "
                "Upgrade fxsparse, or calibrate the model again."
            )
        try:
            entries = _read_plan(values, "")
        except json_values.Wrong as error:
            raise FxsparseError(f"{source} is not usable: {error}. {_REMEDY}") from error
        keys = [entry.key for entry in entries]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise FxsparseError(f"{source} is not usable: entries[{i}].key is also an earlier entry's. {_REMEDY}")
        return Plan(entries)

    def to_json(self) -> str:
        """Return the plan as JSON text.

        Raises:
            FxsparseError: some value in the plan cannot be, so that the text could not be read back.
        """
        try:
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        except TypeError as error:
            raise FxsparseError(f"The plan is not usable: {error}. Give plain values.") from error
        Plan.from_json(text)
        return text

    @staticmethod
    def from_json(text: str | bytes, source: str = "The plan") -> Plan:
        """Read what `to_json` returned; arguments and errors as for `from_dict`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FxsparseError(f"{source} is not JSON ({error}). {_REMEDY}") from error
        return Plan.from_dict(values, source)

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, whole or not at all.

        Raises:
            FxsparseError: the file cannot be written, or the plan is wrong (see `to_json`).
        """
        path, text = Path(path), self.to_json()
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            try:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise FxsparseError(
                f"The plan cannot be written to '{path}' ({error}). Name a file in a folder that exists."
            ) from error

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a file that `save` wrote.

        Raises:
            FxsparseError: the file cannot be read, or has no plan in it (see `from_dict`).
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise FxsparseError(
                f"The plan '{path}' cannot be read ({error}). Name a file that Plan.save wrote."
            ) from error
        return Plan.from_json(content, f"The plan '{path}'")


def device_name(device: torch.device) -> str:
    """Return a name of a device such that equal names mean equal speed.

    A CPU's name ends in torch's number of threads: "Intel(R) Xeon(R) Gold 6230 x8 threads".
    """
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    return f"{name} x{torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, str]:
    """Return what measured times depend on, and when and where they were measured."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "fxsparse": fxsparse.__version__,
        "cpu kernels": fxsparse.capabilities().cpu,
        "threads": str(torch.get_num_threads()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
    }


def _version(value: Any, place: str) -> int:
    if type(value) is not int or not 1 <= value <= VERSION:
        raise json_values.Wrong(value, place, f"a version from 1 to {VERSION}")
    return value


_read_shape = json_values.tuple_of(json_values.integer)
_read_key = json_values.record(
    PlanKey,
    device=json_values.text,
    dtype=json_values.text,
    shapes=json_values.tuple_of(_read_shape),
    deploy=json_values.one_of(DEPLOYMENTS),
)
_read_site = json_values.record(
    SitePlan,
    path=json_values.one_of(PATHS),
    layout=json_values.optional(json_values.one_of(LAYOUTS)),
    packing=json_values.one_of(PACKINGS),
    input_shape=json_values.optional(_read_shape),
    output_shape=json_values.optional(_read_shape),
    vanilla_ms=json_values.optional(json_values.milliseconds),
    vanilla_ci=json_values.optional(json_values.interval),
    sparse_ms=json_values.optional(json_values.milliseconds),
    sparse_ci=json_values.optional(json_values.interval),
    bound_ms=json_values.optional(json_values.milliseconds),
    reason=json_values.text,
)
read_move = json_values.record(
    Move,
    graph=json_values.text,
    value=json_values.text,
    layout=json_values.one_of(LAYOUTS),
    readers=json_values.tuple_of(json_values.text),
)
_read_entry = json_values.record(
    PlanEntry,
    key=_read_key,
    sites=json_values.by_name(_read_site),
    moves=json_values.tuple_of(read_move),
    model_vanilla_ms=json_values.optional(json_values.milliseconds),
    model_ms=json_values.optional(json_values.milliseconds),
    environment=json_values.by_name(json_values.text),
    notes=json_values.tuple_of(json_values.text),
)
_read_plan = json_values.record(
    lambda entries, **_: entries,
    format=json_values.text,
    version=_version,
    entries=json_values.tuple_of(_read_entry),
)


def _difference(a: PlanKey, b: PlanKey) -> tuple[Any, ...]:
    """Order the entries' keys `a` by how much they differ from `b`."""
    return (
        a.device != b.device,
        _is_cpu(a.device) != _is_cpu(b.device),
        a.dtype != b.dtype,
        a.deploy != b.deploy,
        [len(shape) for shape in a.shapes] != [len(shape) for shape in b.shapes],
        round(_distance(a.shapes, b.shapes), 9),  # so that rounding does not decide between 8 and 32 for 16
        sum(math.prod(shape) for shape in a.shapes),
        a.shapes,
        (a.device, a.dtype, a.deploy),
    )


def _distance(a: tuple[Shape, ...], b: tuple[Shape, ...]) -> float:
    sizes = (
        pair for x, y in itertools.zip_longest(a, b, fillvalue=()) for pair in itertools.zip_longest(x, y, fillvalue=1)
    )
    return sum(abs(math.log2(max(x, 1)) - math.log2(max(y, 1))) for x, y in sizes)


def _is_cpu(device: str) -> bool:
    return _CPU_NAME.search(device) is not None


def _warnings(entry: PlanEntry, key: PlanKey) -> list[str]:
    measured, found = entry.key, []
    if measured.device != key.device:
        found.append(f"The plan was measured on '{measured.device}', and is used on '{key.device}'.")
    if measured.dtype != key.dtype:
        found.append(f"The plan was measured in {measured.dtype}, and is used in {key.dtype}.")
    if measured.deploy != key.deploy:
        found.append(f"The plan was measured with deployment '{measured.deploy}', and is used with '{key.deploy}'.")
    if measured.shapes != key.shapes:
        found.append("The plan was measured at {}, and is used at {}.".format(*_in_words(measured.shapes, key.shapes)))
    now = {"torch": torch.__version__, "fxsparse": fxsparse.__version__}
    if _is_cpu(key.device):
        now["cpu kernels"] = fxsparse.capabilities().cpu
    for name, value in now.items():
        then = entry.environment.get(name, value)
        if then != value:
            found.append(f"The plan was measured with {name} {then}, and is used with {name} {value}.")
    return found


def _in_words(a: tuple[Shape, ...], b: tuple[Shape, ...]) -> tuple[str, str]:
    """Describe two unequal tuples of shapes: by the batch sizes, where nothing else differs."""
    if all(a) and all(b) and [shape[1:] for shape in a] == [shape[1:] for shape in b]:
        batches = [{shape[0] for shape in shapes} for shapes in (a, b)]
        if all(len(batch) == 1 for batch in batches):
            return f"batch {batches[0].pop()}", f"batch {batches[1].pop()}"
    plural = "input shapes" if len(a) != 1 or len(b) != 1 else "input shape"
    first, second = (", ".join(map(str, shapes)) or "no tensors" for shapes in (a, b))
    return f"{plural} {first}", f"{plural} {second}"
