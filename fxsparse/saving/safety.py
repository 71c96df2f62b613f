"""Check a saved model before torch reads it.

Threat model. The file may come from anybody and may be damaged: every byte of it may be chosen by someone who wants to
run code on this machine, to crash the process, to read memory, or to fill it. `torch.export.load` was not made for such
files. It unpickles what the file marks as pickled (which runs any code), evaluates sizes with `eval`, pastes names into
Python source that it executes, calls any attribute of `torch` that the program names, imports modules for enums and
default factories, and hands kernels whatever indices it finds. So `check` comes first, in plain Python, and lets
through only files whose every part is of a form that `fxsparse.save` writes:

- the zip file itself, so that torch's reader finds the same entries (`zip_entries`); known names; SHA-256 of all;
- the program: known fields, plain names, operators from an allow list, sizes in a small grammar (`program_check`);
- tensors: raw bytes, never pickled, their sizes and strides within their files (`payload_check`);
- the tables of packed weights: read by sparse convolutions alone, in memory that no other tensor shares. What they hold
  is validated by `load`, after this, once they are tensors.

What is left to a hostile file is to be a bad model: one that computes nonsense, or much, when it is called. The sums
in the file find damage, not forgery: whoever changes a file can compute them anew. Who can write to the file while it
is being loaded is trusted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fxsparse import json_values
from fxsparse.errors import FxsparseError
from fxsparse.json_values import Wrong
from fxsparse.saving import payload_check
from fxsparse.saving.program_check import TABLES, Program
from fxsparse.saving.site_state import Damaged
from fxsparse.saving.zip_entries import REMEDY as REMEDY
from fxsparse.saving.zip_entries import Archive

FORMAT = "fxsparse model"
VERSION = 1
"""Of the archive. Raise this when an older fxsparse could not load what is written."""

MANIFEST = "extra/fxsparse/manifest.json"
STATE = "extra/fxsparse/state.json"
PLAN = "extra/fxsparse/plan.json"
REPORT = "extra/fxsparse/report.json"
REGROUPINGS = "data/fxsparse/regroupings.safetensors"
PROGRAM = "models/model.json"
WEIGHTS, WEIGHTS_PREFIX = "data/weights/", "weight_"
CONSTANTS, CONSTANTS_PREFIX = "data/constants/", "tensor_"
WEIGHTS_LIST = WEIGHTS + "model_weights_config.json"
CONSTANTS_LIST = CONSTANTS + "model_constants_config.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"  # torch.load runs on it unless it is empty
_BY_TORCH = {
    "archive_format": re.compile(rb"pt2"),
    "archive_version": re.compile(rb"0"),
    "byteorder": re.compile(rb"little"),
    ".data/version": re.compile(rb"\d{1,3}\n"),
    ".data/serialization_id": re.compile(rb"\d{1,80}"),
    _SAMPLE_INPUTS: re.compile(rb""),
}
_NEEDED = {MANIFEST, STATE, PLAN, REPORT, REGROUPINGS, PROGRAM, WEIGHTS_LIST, CONSTANTS_LIST, *_BY_TORCH}
_PAYLOAD = re.compile(rf"({WEIGHTS}{WEIGHTS_PREFIX}|{CONSTANTS}{CONSTANTS_PREFIX})\d{{1,9}}")
_LARGEST_JSON = 64 << 20


class Checked(NamedTuple):
    """The parts of a checked file that are no program: JSON values, whose fields their readers check."""

    manifest: Any
    state: Any
    plan: Any
    report: Any
    regroupings: bytes


def check(path: str | Path) -> Checked:
    """Refuse a file that `fxsparse.save` cannot have written; nothing in it is run, and no tensor is made.

    Args:
        path: of the file.

    Returns:
        What `load` needs besides the program.

    Raises:
        FxsparseError: the file is missing, damaged, foreign or hostile, or a newer version wrote it.
    """
    with opened(path) as archive:
        manifest = read_manifest(archive)
        _check_sums(archive, manifest["sha256"])
        for name, pattern in _BY_TORCH.items():
            if not pattern.fullmatch(archive.read(name, 100)):
                raise archive.broken(f"the entry '{name}' holds something unknown")
        program = _in_entry(PROGRAM, lambda: Program(read_json(archive, PROGRAM)))
        state = read_json(archive, STATE)
        tables = {f"{stem}_{table}" for stem in packed_stems(state) for table in TABLES}
        tensors = tensors_of(archive, *(read_json(archive, name) for name in (WEIGHTS_LIST, CONSTANTS_LIST)))
        _check_booleans(archive, tensors)
        _in_entry(PROGRAM, lambda: _check_tensors(program, tensors, program.tables | tables))
        return Checked(
            manifest,
            state,
            read_json(archive, PLAN),
            read_json(archive, REPORT),
            archive.read(REGROUPINGS, archive.entries[REGROUPINGS].size),
        )


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Archive]:
    """Open a saved model, with `reading` around what is done inside.

    Raises:
        FxsparseError: there is no such file, or it is no zip file as `fxsparse.save` writes it.
    """
    refuse_no_file(path, "fxsparse.save")
    with reading(path), Path(path).open("rb") as file:
        yield Archive(file, str(path))


def refuse_no_file(path: str | Path, writer: str) -> None:
    """Refuse what is no file: to open a pipe could wait for ever.

    Raises:
        FxsparseError: it is none.
    """
    if not Path(path).is_file():
        raise FxsparseError(f"'{path}' is no file. Name a file that {writer} wrote.")


def refuse_newer(path: str | Path, version: Any, newest: int) -> None:
    """Refuse a file of a newer form, before anything else in it can look wrong.

    Raises:
        FxsparseError: the version is an integer above the newest that is known.
    """
    if type(version) is int and version > newest:
        raise FxsparseError(
            f"'{path}' was written by a newer fxsparse (format version {version}; this one reads up to {newest}). "
            "Upgrade fxsparse."
        )


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong inside, while a file is read, into one FxsparseError that names the file."""
    try:
        yield
    except FxsparseError:
        raise
    except (Wrong, Damaged) as error:
        raise FxsparseError(f"'{path}' is damaged or was changed: {error}. {REMEDY}") from error
    except OSError as error:
        raise FxsparseError(f"'{path}' cannot be read ({error}). Name a file that fxsparse.save wrote.") from error
    except Exception as error:  # torch's loader raises anything at all
        lines = str(error).strip().splitlines() or [""]
        raise FxsparseError(
            f"'{path}' cannot be loaded ({type(error).__name__}: {lines[-1]:.300}). It may be damaged, or be for "
            f"another version of torch. {REMEDY}"
        ) from error


def read_manifest(archive: Archive) -> dict[str, Any]:
    """Read what an archive is, and check that it has every entry and no unknown one.

    Raises:
        FxsparseError: this is another kind of file, or a newer version wrote it.
    """
    if MANIFEST not in archive.entries:
        raise FxsparseError(
            f"'{archive.path}' is a zip file, but none that fxsparse.save wrote: it has no '{MANIFEST}'. Use "
            "torch.load, torch.jit.load or torch.export.load for files of torch."
        )
    manifest: Any = read_json(archive, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FxsparseError(f"'{archive.path}' is no model of fxsparse: its 'format' is not '{FORMAT}'. {REMEDY}")
    refuse_newer(archive.path, manifest.get("version"), VERSION)
    _in_entry(MANIFEST, lambda: _read_manifest(manifest, ""))
    missing = _NEEDED - set(archive.entries)
    if missing:
        raise archive.broken(f"the entry '{min(missing)}' is missing")
    for name in archive.entries:
        if name not in _NEEDED and not _PAYLOAD.fullmatch(name):
            raise archive.broken(f"the entry '{name:.80}' is unknown")
    return manifest


def read_json(archive: Archive, name: str) -> Any:
    """Read the JSON values of an entry.

    Raises:
        FxsparseError: the entry is damaged or is no JSON.
    """
    return parse_json(archive.read(name, _LARGEST_JSON), f"'{archive.path}': the entry '{name}'")


def read_summed_json(archive: Archive, name: str, manifest: dict[str, Any]) -> Any:
    """Read the JSON values of one entry, where the others are not checked, and compare its sum.

    Raises:
        FxsparseError: the entry is damaged or is no JSON.
    """
    _check_sum(archive, name, manifest["sha256"].get(name))
    return read_json(archive, name)


def tensors_of(archive: Archive, weights: Any, constants: Any) -> dict[str, tuple[str, int]]:
    """Read both lists of tensors; return, by tensor, the entry that holds it and the number of its dtype.

    Args:
        archive: whose entries they name.
        weights, constants: the JSON values of the lists.

    Raises:
        Wrong: a tensor is pickled, or is not inside its entry.
    """
    tensors: dict[str, tuple[str, int]] = {}
    for folder, listing, prefix, values in (
        (WEIGHTS, WEIGHTS_LIST, WEIGHTS_PREFIX, weights),
        (CONSTANTS, CONSTANTS_LIST, CONSTANTS_PREFIX, constants),
    ):
        start = folder + prefix
        sizes = {n.removeprefix(folder): e.size for n, e in archive.entries.items() if n.startswith(start)}
        found = _in_entry(listing, functools.partial(payload_check.read, values, sizes, prefix))
        tensors |= {name: (folder + file, dtype) for name, (file, dtype) in found.items()}
    return tensors


def packed_stems(state: Any) -> frozenset[str]:
    """Return the stems of the names of the packed tensors that the sites of a file have.

    Raises:
        Wrong: the state cannot be one.
    """
    sites = state.get("sites") if isinstance(state, dict) else None
    if not isinstance(sites, dict) or not all(isinstance(site, dict) for site in sites.values()):
        raise Wrong(state, f"'{STATE}'", "an object that holds an object of sites")
    stems = (json_values.optional(json_values.text)(site.get("packed"), "packed") for site in sites.values())
    return frozenset(stem for stem in stems if stem is not None)


def parse_json(content: bytes | str, what: str) -> Any:
    """Read JSON that no reader could read otherwise: no field twice, no NaN.

    Raises:
        FxsparseError: it is no such JSON.
    """
    try:
        return json.loads(content, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FxsparseError(f"{what} is no valid JSON ({error}). {REMEDY}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has a field twice")
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _in_entry(name: str, read: Any) -> Any:
    """Name the entry in front of what is wrong in it."""
    try:
        return read()
    except Wrong as error:
        error.args = (f"in '{name}', {error}",)
        raise


def _check_sums(archive: Archive, sums: dict[str, str]) -> None:
    others = set(archive.entries) - {MANIFEST}
    if set(sums) != others:
        raise archive.broken(f"its list of entries differs from them in '{min(set(sums) ^ others):.80}'")
    for name in sorted(others):
        _check_sum(archive, name, sums[name])


def _check_sum(archive: Archive, name: str, expected: str | None) -> None:
    if archive.sha256(name) != expected:
        raise archive.broken(f"the entry '{name}' is not the one that was saved (its SHA-256 differs)")


def _check_booleans(archive: Archive, tensors: dict[str, tuple[str, int]]) -> None:
    for entry in {entry for entry, dtype in tensors.values() if dtype == payload_check.BOOL}:
        if archive.read(entry, archive.entries[entry].size).strip(b"\0\1"):
            raise archive.broken(f"the entry '{entry}' holds booleans that are neither true nor false")


def _check_tensors(program: Program, tensors: dict[str, tuple[str, int]], tables: set[str]) -> None:
    """Check that the program's tensors exist, and that nothing but sparse convolutions can touch tables."""
    for name in program.targets.values():
        if name not in tensors:
            raise Wrong(name, "signature.input_specs", "a tensor that the file has")
    users: dict[str, set[str]] = {}
    for name, (entry, _) in tensors.items():
        users.setdefault(entry, set()).add(name)
    for name in sorted(tables & set(tensors)):
        if name in program.others:
            raise Wrong(name, "a table of a packed weight", "read by sparse convolutions alone")
        if not users[tensors[name][0]] <= tables:
            raise Wrong(name, "a table of a packed weight", "alone in its memory")


def _sum(value: Any, place: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise Wrong(value, place, "a SHA-256 in hexadecimal")
    return value


_read_manifest = json_values.record(
    dict,
    format=json_values.text,
    version=json_values.integer,
    fxsparse=json_values.text,
    torch=json_values.text,
    sha256=json_values.by_name(_sum),
)
