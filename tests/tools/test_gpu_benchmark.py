"""Run `python -m benchmarks gpu` without a GPU: every step at toy size, failing steps, the
model.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: there is nothing to measure")

from benchmarks import gpu_model
from benchmarks.__main__ import main
from benchmarks.gpu import correctness, end_to_end, supervisor, verdict
from benchmarks.gpu.bench import Bench, NotHere, WrongNumbersError
from benchmarks.gpu.card import Card
from benchmarks.gpu.plan import Step, steps
from benchmarks.gpu.runner import Runner
from benchmarks.gpu_calibration import calibration, fit
from benchmarks.record import read_json, save
from fdd_kernels.testing import evaluate

RUNNER = """
import sys
from tests.support.interpreter import speed_up

speed_up()
from benchmarks.gpu.runner import main

sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_dry_run_takes_every_step(tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        command = [sys.executable, "-c", RUNNER]
        patch.setattr(
            supervisor, "supervise", functools.partial(supervisor.supervise, command=command)
        )
        assert main(["gpu", "--dry-run", "--minutes", "24", "--output", str(tmp_path)]) == 0, (
            capfd.readouterr()
        )
    found = read_json(tmp_path / supervisor.RECORD)["steps"]
    assert list(found) == [step.name for step in steps()]
    for name, entry in found.items():
        allowed = ("not installed", "no soft cap")
        assert entry["status"] == "ok" or (
            entry["status"] == "not here" and entry["reason"].endswith(allowed)
        ), (name, entry)
    assert "DRY RUN" in capfd.readouterr().out
    # The same command again, with the runner as it is, has nothing left to do.
    assert main(["gpu", "--dry-run", "--minutes", "1", "--output", str(tmp_path)]) == 0
    assert read_json(tmp_path / supervisor.RECORD)["steps"] == found


def run(tmp_path, plan, seconds=60.0):
    """A plan's exit status and record, on the stand-in."""
    path = tmp_path / supervisor.RECORD
    if not path.exists():
        save(path, supervisor.resumed(path, dry=True, fresh=False))
    code = Runner(path, time.time() + seconds, Card(dry=True), plan).run()
    return code, read_json(path)


def raising(error):
    def step(bench):
        bench.report("before", 1)
        raise error

    return step


def test_steps_that_fail_are_recorded_and_the_next_are_taken(tmp_path):
    plan = [
        Step("fails", raising(RuntimeError("no luck")), 5),
        Step("too large", raising(torch.OutOfMemoryError("much too large")), 5),
        Step("absent", raising(NotHere("no such package")), 5),
        Step("good", lambda bench: {"ms": 1.0, "beyond_gradients": 0}, 5),
    ]
    code, record = run(tmp_path, plan)
    assert code == supervisor.DONE
    assert [e["status"] for e in record["steps"].values()] == [
        "failed",
        "out of memory",
        "not here",
        "ok",
    ]
    assert record["running"] is None
    failed = record["steps"]["fails"]
    assert failed["results"] == {"before": 1}
    assert "raise error" in failed["traceback"]
    assert record["steps"]["good"]["results"]["ms"] == 1.0


def test_wrong_numbers_stop_the_run_and_every_later_one(tmp_path):
    plan = [
        Step("wrong", raising(WrongNumbersError("2 + 2 = 5")), 5),
        Step("later", lambda bench: {}, 5),
    ]
    for _ in range(2):
        code, record = run(tmp_path, plan)
        assert code == supervisor.WRONG
        assert list(record["steps"]) == ["wrong"]
        assert record["steps"]["wrong"]["reason"] == "2 + 2 = 5"


def test_a_step_over_its_cap_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(Card, "size", lambda self, real, toy: real)
    plan = [Step("slow", lambda bench: time.sleep(30), 0.2), Step("next", lambda bench: {}, 5)]
    _, record = run(tmp_path, plan)
    assert [e["status"] for e in record["steps"].values()] == ["over time", "ok"]


def test_a_step_that_the_end_of_the_time_cuts_short_is_taken_again(tmp_path):
    plan = [Step("slow", lambda bench: time.sleep(30), 1.0), Step("next", lambda bench: {}, 5)]
    _, record = run(tmp_path, plan, seconds=1.2)
    assert {name: entry["status"] for name, entry in record["steps"].items()} == {
        "slow": "cut short"
    }
    _, record = run(tmp_path, [Step("slow", lambda bench: {}, 1.0)])
    assert record["steps"]["slow"]["status"] == "ok"


def test_another_device_begins_another_record(tmp_path):
    plan = [Step("good", lambda bench: {}, 5)]
    path = tmp_path / supervisor.RECORD
    run(tmp_path, plan)
    save(path, read_json(path) | {"device": "another"})
    run(tmp_path, plan)
    assert read_json(tmp_path / "gpu-1.json")["device"] == "another"
    assert read_json(path)["device"] == Card(dry=True).name


CHILD = """
import json, sys, time
from pathlib import Path
path = Path(sys.argv[1])
data = json.loads(path.read_text())
if "hangs" in data["steps"] and "dies" in data["steps"]:
    sys.exit(0)
name = "dies" if "hangs" in data["steps"] else "hangs"
data["running"] = {"step": name, "since": time.time(), "until": time.time() + 0.2}
path.with_suffix(".new").write_text(json.dumps(data))
path.with_suffix(".new").replace(path)
if name == "dies":
    sys.exit(139)
time.sleep(60)
"""


def test_a_step_that_hangs_or_kills_its_process_costs_only_itself(tmp_path):
    command = [sys.executable, "-c", CHILD]
    assert (
        supervisor.supervise(tmp_path, 1.0, dry=True, grace=0.3, command=command)
        == supervisor.FAILED
    )
    found = read_json(tmp_path / supervisor.RECORD)["steps"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "hangs": "killed",
        "dies": "killed",
    }
    assert "hung" in found["hangs"]["reason"]
    assert "139" in found["dies"]["reason"]


def test_a_child_that_cannot_begin_is_not_started_again(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(2)"]
    assert supervisor.supervise(tmp_path, 1.0, dry=True, command=command) == supervisor.FAILED


def test_a_record_of_other_code_is_put_aside(tmp_path):
    path = tmp_path / supervisor.RECORD
    for content in (json.dumps({"format": 1, "sources": "other"}), "torn"):
        path.write_text(content)
        assert supervisor.resumed(path, dry=True, fresh=False)["steps"] == {}
    assert {p.name for p in tmp_path.iterdir()} == {"gpu-1.json", "gpu-2.json"}


def test_rows_are_halved_until_they_fit(monkeypatch):
    """Drop a case that runs out of memory, or whose loss differs from ours."""
    bench, reports, asked = Bench(Card(dry=True), lambda *report: reports.append(report)), [], []
    workload = replace(bench.workload("Llama"), rows=8)

    def measured(bench, workload, way):
        asked.append((workload.rows, way is end_to_end.WAYS["auto"]))
        if workload.rows > 2 or not fits:
            raise torch.OutOfMemoryError("too large")
        return {"ms": 1.0}

    monkeypatch.setattr(end_to_end, "_measured", measured)
    fits = True
    found = end_to_end.measure(bench, workload, "one_pass")
    assert found == {"ms": 1.0, "ours_at_these_rows": {"ms": 1.0}}
    assert asked == [(8, False), (4, False), (2, False), (2, True)]
    assert reports == [("8 rows", "out of memory"), ("4 rows", "out of memory")]
    fits = False
    with pytest.raises(torch.OutOfMemoryError):
        end_to_end.measure(bench, workload, "one_pass")
    monkeypatch.setitem(end_to_end.WAYS, "liger", replace(end_to_end.WAYS["liger"], package=None))
    with pytest.raises(NotHere, match="has no soft cap"):
        end_to_end.measure(bench, bench.workload("Gemma"), "liger")


def test_numbers_beyond_their_budget_are_wrong(monkeypatch):
    bench = Bench(Card(dry=True), lambda *_: None)
    outcome = evaluate(correctness.build(bench, "plain")[0], backend="torch")
    outcome.gradients["student_weight"].mul_(1.5)
    monkeypatch.setattr(correctness, "evaluate", lambda *_, **__: outcome)
    with pytest.raises(WrongNumbersError, match="auto, plain: student_weight is beyond its budget"):
        correctness.check(bench, "auto", "plain")


def record_of(**ms):
    """A record whose steps took so many milliseconds."""
    entries = {step: {"status": "ok", "seconds": 1.0, "results": {}} for step in verdict.CORRECT}
    for name, value in ms.items():
        pair, way = name.split("_")
        way = {"compile": "torch.compile"}.get(way, way)
        pair = {"GPT2": "GPT-2"}.get(pair, pair)
        results = {"ms": value, "predicted_ms": value, "beyond_gradients": 2**20, "rows": 4096}
        entries[f"{pair}: {way}"] = {"status": "ok", "seconds": 1.0, "results": results}
    return {"device": "some card", "sources": "0", "dry_run": False, "steps": entries}


GOOD = {"Llama_auto": 28.0, "Qwen_auto": 88.0, "GPT2_auto": 21.0}
GOOD |= {"Llama_dense": 67.0, "Qwen_dense": 278.0, "GPT2_dense": 87.0}
GOOD |= {"Llama_compile": 28.0, "Qwen_compile": 110.0, "GPT2_compile": 31.0}


def test_verdict():
    assert verdict.verdict(record_of(**GOOD))[0] == "accepted"
    assert (
        verdict.verdict(record_of(**{k: v for k, v in GOOD.items() if k != "Qwen_compile"}))[0]
        == "open"
    )
    for slow in (
        {"Llama_auto": 28.1},
        {"Qwen_compile": 92.0},
        {"GPT2_dense": 35.0},
        {"Gemma_auto": 300.0, "Gemma_dense": 488.0},
    ):
        assert verdict.verdict(record_of(**GOOD | slow))[0] == "refused"
    record = record_of(**GOOD)
    record["steps"]["correct: essentials"]["status"] = "wrong"
    assert verdict.verdict(record)[0] == "refused"
    # Compare a dense loss that fits only with fewer rows with ours at these rows.
    record = record_of(**GOOD)
    record["steps"]["Qwen: dense"]["results"] |= {"ms": 139.0, "ours_at_these_rows": {"ms": 100.0}}
    assert verdict.verdict(record)[0] == "refused"
    record["steps"]["GEMMs: alone"] = {
        "status": "ok",
        "seconds": 1.0,
        "results": {"Llama M=4220": {"dH": {"ms": 1.0, "tflops": 700.0, "predicted_ms": 0.9}}},
    }
    text = verdict.text(record)
    assert "700 TF/s    1.000 ms (predicted 0.900)" in text
    assert "0.719" in text  # the default's 100 of the dense loss's 139 ms, at its rows
    assert text.endswith("verdict: refused")


def test_model_fits_what_it_was_fitted_to():
    found = fit(calibration())
    assert 0.9 < found["median"] < 1.1
    assert found["least"] > 0.7
    assert found["most"] < 1.2


def test_model_says_what_every_figure_is(monkeypatch, capsys, tmp_path):
    path = tmp_path / "model.json"
    monkeypatch.setattr(sys, "argv", ["gpu_model", "--device", "H100", "--json", str(path)])
    gpu_model.main()
    text = capsys.readouterr().out
    assert "PREDICTED, NOT MEASURED" in text
    assert "linkedin/Liger-Kernel" in text
    rows = json.loads(path.read_text())
    assert {row["status"] for row in rows} == {"predicted"}
    assert {row["pair"] for row in rows} == {"GPT-2", "Llama", "Qwen", "Gemma"}


@pytest.mark.parametrize("device", gpu_model.DEVICES.values(), ids=lambda d: d.name)
@pytest.mark.parametrize("pair", gpu_model.PAIRS)
def test_parts_of_the_model_add_up_to_the_whole(device, pair):
    call = gpu_model.Call(gpu_model.PAIRS[pair])
    found = gpu_model.cached(device, call)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    rows = found.block_rows // call.layers
    assert rows * (found.blocks - 1) < call.rows <= rows * found.blocks
    # All GEMMs at the device's fraction of its peak are a lower bound.
    operations = 2 * call.elements * (3 * call.student + call.teacher)
    assert found.seconds > operations / (device.gemms * device.gemm)
    assert (
        gpu_model.cached(device, gpu_model.Call(gpu_model.PAIRS[pair], trained=False)).seconds
        < found.seconds
    )
