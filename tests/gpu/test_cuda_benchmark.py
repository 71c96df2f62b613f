"""`python -m benchmarks cuda` on its smallest network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_and_json_hold_every_number(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    options = ("--networks", "vgg16:32:16", "--zeros", "0.9", "--no-compile", "--calibration", "1", "--budget", "0.2")
    result = command.main(["cuda", *options, "--dtype", dtype, "--json", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    (network,) = result["networks"]
    (row,) = network["rows"]
    assert (row["name"], row["batch"], row["dtype"], row["zeros"]) == ("vgg16", 16, dtype, 0.9)
    assert (
        set(network["ms"])
        == set(network["errors"])
        == {
            "channels_last graph",
            "contiguous graph",
            "fxsparse regrouped 0.9",
        }
    )
    assert all(ms > 0 for ms in network["ms"].values())
    assert "| vgg16" in capsys.readouterr().out


def test_the_ticket_s_layers(capsys: pytest.CaptureFixture[str]) -> None:
    result = command.main(["cuda", "--layers", "--ticket", "--only", "*512-512@2", "--batch", "8"])
    assert len(result["layers"]) == 3 and all(case["ratio"] > 0 and case["error"] < 3e-3 for case in result["layers"])
    assert "features.40" in capsys.readouterr().out
