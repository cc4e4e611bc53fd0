"""Bound the bytes and launches of Triton's default strategy by recorded launches, without a GPU."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed: there is nothing to record")

from benchmarks import traffic
from benchmarks.__main__ import main
from benchmarks.gpu_model import DEVICES, PAIRS, Call, cached


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_product_once_and_few_bytes_and_kernels(pair, trained):
    found = traffic.count(pair, 4096, trained=trained)
    assert found["gemms_per_head_and_block"] == 1
    kinds = {"student logits", "teacher logits", "dH"} | ({"dW"} if trained else set())
    assert found["covered"] == dict.fromkeys(kinds, 1.0)
    # Logits written (8), loaded for statistics and gradient (8 + 8), dL/dx written (2) and loaded
    # for dH and dW (2 + 2).
    assert found["bytes_per_element"] <= (30 if trained else 28) + 1e-9
    assert found["state_bytes_per_element"] <= 1
    assert found["kernels_per_block"] <= 60
    # The model's bytes, and the state of the tiles.
    predicted = cached(DEVICES["H100"], Call(PAIRS[pair], 4096, trained=trained))
    assert found["block_rows"] * 5 == predicted.block_rows
    assert found["peak_scratch_bytes"] <= 1.1 * predicted.kept + 2**27


def test_more_rows_take_more_blocks_and_no_more_scratch():
    few, many = (traffic.count("Llama", rows, trained=True) for rows in (4096, 8192))
    assert many["blocks"] > few["blocks"]
    assert many["bytes_per_element"] == pytest.approx(few["bytes_per_element"])
    # The gradients' own dtype and order of rows grow with the rows, by four bytes a row or so.
    assert many["peak_scratch_bytes"] < 1.05 * few["peak_scratch_bytes"]


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(traffic, "ROWS", (4096,))
    monkeypatch.setattr(traffic, "PAIRS", {"Llama": PAIRS["Llama"]})
    path = tmp_path / "traffic.json"
    assert main(["traffic", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["head"] for row in rows] == ["trained", "frozen"]
    keys = {"pair", "rows", "head", "gemms_per_head_and_block", "bytes_per_element"}
    keys |= {"peak_scratch_bytes", "kernels_per_block"}
    assert keys <= rows[0].keys()
    assert "nothing is measured" in capsys.readouterr().out
