"""Keep regroupings on disk, by the content of the mask and the target.

An entry is one .npz file without pickles that holds the blocks; the residual is the mask's rest, so an entry
can never lose a kept weight. What cannot be read, or does not fit the mask, is ignored and computed again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fxsparse.errors import FxsparseError
from fxsparse.regrouping.regrouping import Block, Regrouping
from fxsparse.regrouping.target import Target
from fxsparse.regrouping.weight_matrix import BoolArray

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raise this when the files or the decisions of the algorithm change."""


def folder(cache: bool | str | Path | None) -> Path | None:
    """Return the folder to use for a ``cache`` argument, None for no cache.

    The default folder is ``$FXSPARSE_CACHE_DIR``, else ``$XDG_CACHE_HOME/fxsparse``, else
    ``~/.cache/fxsparse``.

    Args:
        cache: a path, True for the default folder, False for none; None for the default folder if
            ``FXSPARSE_CACHE_DIR`` is set and for none otherwise.

    Raises:
        FxsparseError: ``cache`` is of another type.
    """
    if isinstance(cache, (str, Path)):
        return Path(cache).expanduser()
    if cache is not None and not isinstance(cache, bool):
        raise FxsparseError(f"Cache is {cache!r}. Give a folder, True, False or None.")
    named = os.environ.get("FXSPARSE_CACHE_DIR")
    if cache is False or (cache is None and not named):
        return None
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fxsparse"


def key(matrix: BoolArray, groups: int, target: Target) -> str:
    """Return the sha256 of everything that a regrouping depends on, in hex.

    Args:
        matrix: the mask, [O, K].
        groups: convolution groups.
        target: the prices and the partitioner.
    """
    about = {
        "version": FORMAT_VERSION,
        "shape": list(matrix.shape),
        "groups": groups,
        "target": target.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(np.packbits(matrix).tobytes())
    return digest.hexdigest()


def load(place: Path, name: str, matrix: BoolArray, groups: int) -> Regrouping | None:
    """Return the entry ``name`` for this mask, or None where there is none that can be used.

    Args:
        place: the folder.
        name: the key.
        matrix: the mask that the key was made from, [O, K].
        groups: convolution groups.
    """
    path = place / f"{name}.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as entry:
            if entry["key"].tobytes().decode() != name:
                raise ValueError("it is the entry of another mask or target")
            rows = np.split(entry["rows"].astype(np.int64), np.cumsum(entry["row_counts"])[:-1])
            columns = np.split(entry["columns"].astype(np.int64), np.cumsum(entry["column_counts"])[:-1])
            count = entry["row_counts"].size
        blocks = tuple(Block(r, c) for r, c in zip(rows, columns, strict=True)) if count else ()
        inside = np.zeros(matrix.shape, dtype=bool)
        for block in blocks:
            if block.rows.size and (block.rows.min() < 0 or block.columns.min(initial=0) < 0):
                raise ValueError("a negative index")
            inside[np.ix_(block.rows, block.columns)] = True
        residual_rows, residual_columns = np.nonzero(matrix & ~inside)
        result = Regrouping(
            (matrix.shape[0], matrix.shape[1]),
            groups,
            blocks,
            residual_rows,
            residual_columns,
            int((inside & ~matrix).sum()),
        )
        result.validate()
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("Ignored the cached regrouping %s: %s. It is computed again.", path, error)
        return None
    return result


def store(place: Path, name: str, regrouping: Regrouping) -> None:
    """Write an entry atomically; a folder that cannot be written is reported once and the work goes on."""
    blocks = regrouping.blocks
    none = [np.zeros(0, dtype=np.int64)]
    temporary = ""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez_compressed(
                file,
                key=np.frombuffer(name.encode(), dtype=np.uint8),
                rows=np.concatenate([block.rows for block in blocks] or none).astype(np.int32),
                columns=np.concatenate([block.columns for block in blocks] or none).astype(np.int32),
                row_counts=np.array([block.rows.size for block in blocks], dtype=np.int64),
                column_counts=np.array([block.columns.size for block in blocks], dtype=np.int64),
            )
        Path(temporary).replace(place / f"{name}.npz")
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        _warn_unwritable(str(place), str(error))


@functools.cache
def _warn_unwritable(place: str, error: str) -> None:
    log.warning("Regroupings are not cached: %s cannot be written (%s).", place, error)
