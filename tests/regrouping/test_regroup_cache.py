import logging
import os
from pathlib import Path

import numpy as np
import pytest

from fxsparse.errors import FxsparseError
from fxsparse.regrouping import Target, lossless, regroup
from fxsparse.regrouping import cache as disk

MASK = np.repeat(np.random.default_rng(0).random((3, 40)) < 0.3, 20, axis=0) ^ (
    np.random.default_rng(1).random((60, 40)) < 0.03
)


@pytest.fixture
def runs(monkeypatch):
    """The masks that were regrouped, not read."""
    seen = []
    compute = lossless._best_labels
    monkeypatch.setattr(lossless, "_best_labels", lambda *a: (seen.append(a[0]), compute(*a))[1])
    return seen


@pytest.fixture(autouse=True)
def no_folder_from_outside(monkeypatch, tmp_path):
    monkeypatch.delenv("FXSPARSE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    disk._warn_unwritable.cache_clear()


def only_entry(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    assert entry.suffix == ".npz"
    return entry


@pytest.mark.parametrize("mask", [MASK, np.zeros((5, 7)), np.random.default_rng(2).random((4, 30)) < 0.2])
def test_a_hit_gives_the_same_regrouping_without_computing(tmp_path, runs, mask):
    first = regroup(mask, cache=tmp_path)
    again = regroup(mask.astype(np.float32), cache=str(tmp_path))
    assert len(runs) == 1
    assert first == again
    assert first == regroup(mask)
    only_entry(tmp_path)


def test_the_key_changes_with_all_that_the_result_depends_on(tmp_path, runs):
    other = MASK.copy()
    other[0, 0] ^= True
    calls = [
        (MASK, Target(), 1),
        (other, Target(), 1),
        (MASK.reshape(40, 60), Target(), 1),
        (MASK, Target(), 2),
        (MASK, Target(residual_cost=3.0), 1),
        (MASK, Target(seed=1), 1),
        (MASK, Target(partitioner="consecutive"), 1),
    ]
    for mask, target, groups in calls:
        regroup(mask, target, groups=groups, cache=tmp_path)
    assert len(runs) == len(calls)
    assert len(list(tmp_path.iterdir())) == len(calls)
    for mask, target, groups in calls:
        regroup(mask, target, groups=groups, cache=tmp_path)
    assert len(runs) == len(calls)


def test_the_format_version_is_in_the_key(monkeypatch):
    old = disk.key(MASK, 1, Target())
    monkeypatch.setattr(disk, "FORMAT_VERSION", disk.FORMAT_VERSION + 1)
    assert disk.key(MASK, 1, Target()) != old


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path):
    data = bytearray(path.read_bytes())
    for at in range(60, len(data), 7):
        data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def _change(**arrays):
    def change(path):
        with np.load(path) as entry:
            content = dict(entry)
        np.savez(path, **{k: v for k, v in (content | arrays).items() if v is not None})

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a zip file"),
        _truncate,
        _flip,
        _change(rows=None),
        _change(rows=np.array([{}], dtype=object)),
        _change(key=np.frombuffer(b"another", np.uint8)),
        _change(rows=np.full(60, 10**6)),
        _change(rows=np.full(60, -1)),
        _change(rows=np.zeros(60, int)),
        _change(columns=np.full((2, 3), 0.5)),
        _change(column_counts=np.array([1])),
        _change(row_counts=np.array([[3]])),
    ],
)
def test_a_damaged_entry_is_reported_computed_again_and_replaced(tmp_path, runs, caplog, damage):
    good = regroup(MASK, cache=tmp_path)
    assert good.blocks
    damage(only_entry(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert regroup(MASK, cache=tmp_path) == good
    assert len(runs) == 2
    (record,) = caplog.records
    assert record.name == "fxsparse.regrouping.cache"
    assert "Ignored the cached regrouping" in record.getMessage()
    caplog.clear()
    assert regroup(MASK, cache=tmp_path) == good
    assert len(runs) == 2
    assert not caplog.records


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        first = regroup(MASK, cache=blocked / "cache")
        second = regroup(~MASK, cache=blocked / "cache")
    assert first == regroup(MASK)
    assert second == regroup(~MASK)
    (record,) = caplog.records
    assert "Regroupings are not cached" in record.getMessage()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_reported_and_the_work_goes_on(tmp_path, caplog):
    tmp_path.chmod(0o500)
    with caplog.at_level(logging.WARNING):
        assert regroup(MASK, cache=tmp_path) == regroup(MASK)
    tmp_path.chmod(0o700)
    assert "cannot be written" in caplog.text


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch, caplog):
    def full(*_args, **_arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with caplog.at_level(logging.WARNING):
        assert regroup(MASK, cache=tmp_path).kept == MASK.sum()
    assert list(tmp_path.iterdir()) == []
    assert "No space left" in caplog.text


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert disk.folder(None) is None
    assert disk.folder(False) is None
    assert disk.folder(True) == tmp_path / "home" / ".cache" / "fxsparse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert disk.folder(True) == tmp_path / "xdg" / "fxsparse"
    assert disk.folder(None) is None
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path / "named"))
    assert disk.folder(True) == disk.folder(None) == tmp_path / "named"
    assert disk.folder(False) is None
    assert disk.folder("~/here") == tmp_path / "home" / "here"
    with pytest.raises(FxsparseError, match="Cache is 3. Give a folder, True, False or None."):
        disk.folder(3)


def test_false_turns_the_cache_off(tmp_path, monkeypatch, runs):
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path / "named"))
    regroup(MASK, cache=False)
    assert not (tmp_path / "named").exists()
    regroup(MASK)
    regroup(MASK)
    assert len(runs) == 2
    only_entry(tmp_path / "named")
