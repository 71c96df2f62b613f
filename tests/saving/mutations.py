"""Kinds of damage to a saved file, each drawn at random from a seed."""

from __future__ import annotations

import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from archives import Entries, changed_weights, converted, packed, unpacked
from hostile import HOSTILE

import fxsparse
from fxsparse.saving import safety

CODE = "open({canary!r}, 'w')"
_TABLES = ("_columns", "_panels", "_rows")
_JSON = (
    safety.MANIFEST,
    safety.STATE,
    safety.PLAN,
    safety.REPORT,
    safety.PROGRAM,
    safety.WEIGHTS_LIST,
    safety.CONSTANTS_LIST,
)


class Base(NamedTuple):
    """A good file, whole and, if it is a model, taken apart."""

    kind: str
    content: bytes
    entries: Entries


class Draw(NamedTuple):
    """What a mutation may use."""

    random: random.Random
    folder: Path
    canary: Path

    def size(self, most: int) -> int:
        """Draw a length, small ones as often as large ones."""
        return min(most, int(2 ** self.random.uniform(0, most.bit_length())))

    def pack(self, entries: Entries) -> bytes:
        """Put a model together, with sums that are right."""
        return packed(self.folder / "packed.pt2", entries)


Mutation = Callable[[Base, Draw], bytes]


def truncated(base: Base, draw: Draw) -> bytes:
    keep = draw.random.randrange(len(base.content))
    return base.content[:keep]


def bit_flipped(base: Base, draw: Draw) -> bytes:
    return _flipped(base.content, draw)


def _flipped(content: bytes, draw: Draw) -> bytes:
    at = draw.random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.random.randrange(8)]) + content[at + 1 :]


def blocks_swapped(base: Base, draw: Draw) -> bytes:
    content, size = base.content, draw.size(len(base.content) // 4)
    a, b = sorted(
        (draw.random.randrange(len(content) // 2 - size), draw.random.randrange(len(content) // 2, len(content) - size))
    )
    first, second = content[a : a + size], content[b : b + size]
    return content[:a] + second + content[a + size : b] + first + content[b + size :]


def zeroed(base: Base, draw: Draw) -> bytes:
    size = draw.size(len(base.content) // 4)
    at = draw.random.randrange(len(base.content) - size)
    return base.content[:at] + bytes(size) + base.content[at + size :]


def longer(base: Base, draw: Draw) -> bytes:
    at = draw.random.choice((0, len(base.content), draw.random.randrange(len(base.content))))
    return base.content[:at] + draw.random.randbytes(draw.size(5000)) + base.content[at:]


def entry_of_garbage(base: Base, draw: Draw) -> bytes:
    name = draw.random.choice(list(base.entries))
    size = draw.random.choice((0, len(base.entries[name]), draw.size(5000)))
    return draw.pack({**base.entries, name: draw.random.randbytes(size)})


def entry_flipped(base: Base, draw: Draw) -> bytes:
    """One bit in an entry that is no tensor, with the sums made right."""
    name = draw.random.choice([name for name, content in base.entries.items() if content and "weight_" not in name])
    return draw.pack({**base.entries, name: _flipped(base.entries[name], draw)})


def entry_removed(base: Base, draw: Draw) -> bytes:
    gone = draw.random.choice([name for name in base.entries if name != safety.MANIFEST])
    return draw.pack({name: content for name, content in base.entries.items() if name != gone})


def entry_renamed(base: Base, draw: Draw) -> bytes:
    old = draw.random.choice([name for name in base.entries if name != safety.MANIFEST])
    new = draw.random.choice((old.upper(), old + "x", "../" + old, "/" + old, old + "_", "data/weights/weight_77"))
    return draw.pack({new if name == old else name: content for name, content in base.entries.items()})


def entry_twice(base: Base, draw: Draw) -> bytes:
    """The same entry again at the end, which is where Python's zipfile looks first."""
    path = draw.folder / "twice.pt2"
    path.write_bytes(base.content)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = draw.random.choice(archive.namelist())
        archive.writestr(name, archive.read(name))
    return path.read_bytes()


def json_changed(base: Base, draw: Draw) -> bytes:
    name = draw.random.choice(_JSON)
    values = json.loads(base.entries[name])
    values = _mutated(values, draw)
    return draw.pack({**base.entries, name: json.dumps(values).encode()})


def tables_changed(base: Base, draw: Draw) -> bytes:
    """Other numbers in a table of a packed weight: only `validate` can tell."""
    config = json.loads(base.entries[safety.WEIGHTS_LIST])["config"]
    names = [f"data/weights/{meta['path_name']}" for key, meta in config.items() if key.endswith(_TABLES)]
    name = draw.random.choice(names)
    wide = (
        config[next(k for k, m in config.items() if name.endswith("/" + m["path_name"]))]["tensor_meta"]["dtype"] == 5
    )
    return draw.pack({**base.entries, name: _numbers_changed(base.entries[name], "q" if wide else "i", draw)})


def weights_changed(base: Base, draw: Draw) -> bytes:
    """A bit of a float: just another weight."""
    config = json.loads(base.entries[safety.WEIGHTS_LIST])["config"]
    names = [f"data/weights/{m['path_name']}" for m in config.values() if m["tensor_meta"]["dtype"] == 7]
    name = draw.random.choice([name for name in names if base.entries[name]])
    return draw.pack({**base.entries, name: _flipped(base.entries[name], draw)})


def hostile(base: Base, draw: Draw) -> bytes:
    name = draw.random.choice(list(HOSTILE))
    return draw.pack(HOSTILE[name](base.entries, CODE.format(canary=str(draw.canary))))


def newer(base: Base, draw: Draw) -> bytes:
    manifest = {**json.loads(base.entries[safety.MANIFEST]), "version": draw.random.randrange(2, 1 << 40)}
    return draw.pack({**base.entries, safety.MANIFEST: json.dumps(manifest).encode()})


def header_changed(base: Base, draw: Draw) -> bytes:
    """Other JSON in front of the tensors of a weights file, with the sum made right."""

    def change(document: dict[str, Any], listed: dict[str, Any], data: bytearray) -> None:
        target = draw.random.choice((document, document, listed))
        fresh = _mutated(target, draw)
        target.clear()
        target.update(fresh if isinstance(fresh, dict) else {"x": fresh})

    return changed_weights(base.content, change)


def stored_tables_changed(base: Base, draw: Draw) -> bytes:
    """Other numbers in a table of a weights file, with the sum made right."""

    def change(document: dict[str, Any], listed: dict[str, Any], data: bytearray) -> None:
        name = draw.random.choice([name for name in listed if name.endswith(_TABLES)])
        begin, end = listed[name]["data_offsets"]
        letter = "q" if listed[name]["dtype"] == "I64" else "i"
        data[begin:end] = _numbers_changed(bytes(data[begin:end]), letter, draw)

    return changed_weights(base.content, change)


def _numbers_changed(content: bytes, letter: str, draw: Draw) -> bytes:
    numbers = list(struct.unpack(f"<{len(content) // struct.calcsize(letter)}{letter}", content))
    largest = 2 ** (8 * struct.calcsize(letter) - 1) - 1
    for _ in range(draw.random.choice((1, 1, 1, 5))):
        at = draw.random.randrange(len(numbers))
        near = numbers[at] + draw.random.choice((-16, -1, 1, 16, 1000))
        chosen = draw.random.choice((0, -1, largest, -largest - 1, near, near, draw.random.randrange(1 << 16)))
        numbers[at] = max(-largest - 1, min(largest, chosen))
    return struct.pack(f"<{len(numbers)}{letter}", *numbers)


def _mutated(values: Any, draw: Draw) -> Any:
    """Return JSON values with one of them, at a random depth, made something else."""
    values = json.loads(json.dumps(values))
    places: list[tuple[Any, Any]] = []
    stack = [values]
    while stack:
        container = stack.pop()
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], dict | list):
                stack.append(container[key])
    if not places:
        return [values]
    container, key = draw.random.choice(places)
    old = container[key]
    what = draw.random.randrange(5)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, list):
        container.insert(key, old)
    elif what == 1:
        container[draw.random.choice(("x", "__class__", str(key) + "x"))] = old
    elif what == 2 and isinstance(old, int):
        container[key] = old + draw.random.choice((-1, 1, 7, 1 << 31, 1 << 62, -(1 << 62)))
    else:
        container[key] = draw.random.choice(_ODD)
    return values


def _nested(depth: int) -> Any:
    values: Any = []
    for _ in range(depth):
        values = [values]
    return values


_ODD: list[Any] = [
    0, -1, 1, 2, 1 << 31, 1 << 63, -(1 << 63), 1 << 70, 0.5, -1e300, True, False, None, "", "x", "__class__", "../x",
    "__import__('os')", "\0", "é" * 300, "x" * 5000, [], {}, [1], {"x": 1}, [[[]]], _nested(500), {"as_int": 1 << 40},
    {"as_expr": {"expr_str": "1", "hint": None}},
]  # fmt: skip

OF_MODELS: dict[str, Mutation] = {
    "truncated": truncated,
    "one bit flipped": bit_flipped,
    "blocks swapped": blocks_swapped,
    "range zeroed": zeroed,
    "bytes inserted": longer,
    "entry twice": entry_twice,
    "entry of garbage, sums right": entry_of_garbage,
    "bit of an entry, sums right": entry_flipped,
    "entry removed, sums right": entry_removed,
    "entry renamed, sums right": entry_renamed,
    "JSON changed, sums right": json_changed,
    "tables changed, sums right": tables_changed,
    "bit of a weight, sums right": weights_changed,
    "hostile, sums right": hostile,
    "newer version": newer,
}
OF_WEIGHTS: dict[str, Mutation] = {
    "weights file: truncated": truncated,
    "weights file: one bit flipped": bit_flipped,
    "weights file: blocks swapped": blocks_swapped,
    "weights file: range zeroed": zeroed,
    "weights file: bytes inserted": longer,
    "weights file: JSON changed, sum right": header_changed,
    "weights file: tables changed, sum right": stored_tables_changed,
}


def bases(folder: Path) -> list[Base]:
    """Save small models of each form, to damage them."""
    made = []
    for frozen in (False, True):
        path = folder / f"model{frozen}.pt2"
        fxsparse.save(converted(frozen=frozen), path)
        made.append(Base("model", path.read_bytes(), unpacked(path.read_bytes(), folder)))
        path = folder / f"weights{frozen}.safetensors"
        fxsparse.save_weights(converted(frozen=frozen, rung="modules"), path)
        made.append(Base("weights", path.read_bytes(), {}))
    return made
