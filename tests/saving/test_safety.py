"""Hostile, damaged and foreign files: each is refused by one clear error, and nothing in it runs."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from archives import SHAPE, Entries, converted, packed, unpacked
from hostile import HOSTILE

import fxsparse
from fxsparse import FxsparseError
from fxsparse.json_values import Wrong
from fxsparse.saving import expression_check, safe_operators, safety
from fxsparse.saving import program_values as values_of
from fxsparse.saving.zip_entries import Archive


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    fxsparse.save(converted(), path)
    return path


@pytest.fixture
def entries(saved: Path, tmp_path: Path) -> Entries:
    return unpacked(saved.read_bytes(), tmp_path)


def test_a_file_that_is_put_together_again_loads(entries: Entries, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.pt2"
    packed(path, entries)
    x = torch.randn(SHAPE)
    assert torch.equal(fxsparse.load(path)(x), fxsparse.load(saved)(x))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_runs_nothing(name: str, entries: Entries, tmp_path: Path) -> None:
    path, canary = tmp_path / "hostile.pt2", tmp_path / "canary"
    packed(path, HOSTILE[name](entries, f"open({str(canary)!r}, 'w')"))
    with pytest.raises(FxsparseError, match="hostile.pt2"):
        fxsparse.load(path)
    assert not canary.exists()


def _torch_save(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def _torch_export(path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(1),)), path)


def _torch_jit(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), path)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


@pytest.mark.parametrize("write", [_torch_save, _torch_export, _torch_jit, _zip])
def test_other_zip_files_are_called_what_they_are(write: object, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt2"
    write(path)  # type: ignore[operator]
    with pytest.raises(FxsparseError, match="foreign.pt2' is (a zip file, but none|no file|damaged)"):
        fxsparse.load(path)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x05\x06" + b"\0" * 18, b"\0" * 5000, b"text\n" * 100])
def test_what_is_no_zip_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt2"
    path.write_bytes(content)
    for read in (fxsparse.load, fxsparse.saving.info):
        with pytest.raises(
            FxsparseError, match="foreign.pt2' is (no file that fxsparse.save wrote|a zip file, but none)"
        ):
            read(path)


def test_missing_files_folders_and_pipes_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", ".", "pipe"):
        for read in (fxsparse.load, fxsparse.saving.info):
            with pytest.raises(FxsparseError, match="is no file"):
                read(tmp_path / name)


def test_a_file_without_the_right_to_read_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FxsparseError, match="cannot be read .*Permission denied"):
        safety.check(saved)


def test_a_newer_file_says_that_fxsparse_is_too_old(entries: Entries, tmp_path: Path) -> None:
    packed(tmp_path / "new.pt2", HOSTILE["newer manifest"]({**entries, "new/entry": b""}, ""))
    with pytest.raises(FxsparseError, match=r"newer fxsparse \(format version 2; this one reads up to 1\). Upgrade"):
        fxsparse.load(tmp_path / "new.pt2")


def _refused(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(FxsparseError, match=match):
        safety.check(path)


def test_bytes_before_between_and_behind_the_entries_are_refused(saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "model.pt2"
    directory = content.index(b"PK\x01\x02")
    _refused(path, content + b"\0", "it does not end as one")
    _refused(path, content[:-2] + b"\x01\x00x", "it does not end as one")  # a comment
    _refused(path, b"\0" * 64 + content, "does not end as one")
    _refused(path, content[:directory] + b"\0" * 16 + content[directory:], "does not end as one|no entry|damaged")
    _refused(path, content + content, "does not end as one")


def test_two_readers_cannot_disagree_about_an_entry(saved: Path, entries: Entries, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    content = packed(path, entries)
    name = b"archive/models/model.json"
    local, listed = content.index(name), content.rindex(name)
    other = name.replace(b"model.json", b"modem.json")
    _refused(path, content[:local] + other + content[local + len(name) :], "the header at byte")
    _refused(path, content[:listed] + other + content[listed + len(name) :], "the header at byte")
    size = listed - 46 + 24
    _refused(path, content[:size] + b"\xff\xff\xff\x7f" + content[size + 4 :], "not as it was saved")
    packed(path, {**entries, "MODELS/model.json": b"{}"})
    with pytest.raises(FxsparseError, match="two of its entries have one name"):
        safety.check(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/entry", "")
    with pytest.raises(FxsparseError, match="not in one folder"):
        safety.check(path)


def test_compressed_entries_are_refused(entries: Entries, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    packed(path, entries)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/weights/weight_999", "0" * 10_000_000)
    with pytest.raises(FxsparseError, match="not as it was saved"):
        safety.check(path)


@pytest.mark.parametrize("name", ["", "..", "a\0b"])
def test_strange_names_of_the_folder_are_refused(name: str, entries: Entries, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    content = packed(path, entries, root="archive")
    _refused(path, content.replace(b"archive/", (name + "/" * 8)[:8].encode()), "the name of entry|the header")


def test_an_entry_longer_than_can_be_meant_is_not_read(saved: Path) -> None:
    with saved.open("rb") as file:
        archive = Archive(file, str(saved))
        with pytest.raises(FxsparseError, match="at most 10 can be meant"):
            archive.read(safety.PROGRAM, 10)


def test_expressions_that_torch_writes_are_read() -> None:
    symbol = "Symbol('s77', positive=True, integer=True)"
    for text in (
        symbol,
        f"Add(Integer(1), FloorDiv(Add({symbol}, Integer(-1)), Integer(2)))",
        f"Max(Integer(1), Mul(Rational(1, 2), Pow({symbol}, Integer(2))))",
        f"And(Ne({symbol}, Integer(0)), true)",
    ):
        expression_check.check(text, "it")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "s77",
        "Symbol('E')",
        "Symbol('s0', 's1')",
        "Symbol('s0', **{})",
        "Symbol('s0', integer=1)",
        "Integer(1.0)",
        "Integer('1')",
        f"Integer({10**30})",
        "Integer(1)\n",
        "Add(Integer(1), Integer(1), evaluate=False)",
        "Pow(Integer(2), Symbol('s0'))",
        "Pow(Integer(2), Integer(99))",
        "Pow(Integer(2))",
        "Add.__class__",
        "Add[Integer(1)]",
        "Add(*Integer(1))",
        "f'{Integer(1)}'",
        "Integer(1) + Integer(1)",
        "Max(" + ", ".join(["Max(Symbol('s0'), Integer(2))"] * 100) + ")",
        "Add(Integer(1)," * 5000,
        "Integer(\u0661)",
    ],
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(Wrong):
        expression_check.check(text, "it")


def test_every_allowed_operator_exists_and_dangerous_ones_are_not_allowed() -> None:
    registered = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert registered >= safe_operators._ATEN
    for name in (
        "from_file",
        "set_",
        "resize_",
        "_print",
        "empty",
        "data",
        "record_stream",
        "_sparse_coo_tensor_unsafe",
    ):
        assert not safe_operators.is_safe(f"torch.ops.aten.{name}.default")
    assert safe_operators.is_safe("torch.ops.aten.relu_.default")
    assert not safe_operators.is_safe("torch.ops.aten.relu.default\n")


def test_names_of_parameters_may_hold_what_is_harmless_between_quotes() -> None:
    assert values_of.tensor_name("trunk.block1-0.proj:0.weight", "it") == "trunk.block1-0.proj:0.weight"
    for name in ("", ".", "a..b", 'a"b', "a\\b", "a\nb", "a'b", "__dict__.x", "a.__class__", "a" * 2000, 1):
        with pytest.raises(Wrong):
            values_of.tensor_name(name, "it")
