"""`python -m benchmarks step`: the toy pair through the whole command, refusals, tables."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("pandas")
pytest.importorskip("jinja2")
pytest.importorskip("transformers")

from benchmarks import record, runner, step_measure, steps
from benchmarks.__main__ import main
from benchmarks.gemms import operations
from benchmarks.measure import do_job
from benchmarks.report import docs
from benchmarks.report import steps as report
from benchmarks.report.compare import compare
from benchmarks.workloads import Workload
from tests.support.benchmark_records import write

CPU = torch.device("cpu")
TINY = ["step", "--pairs", "tiny", "--tokens", "12", "--repeats", "1", "--threads", "1"]


def in_this_process(module, job, environment):
    """Do a job without the start of a process."""
    assert module == "benchmarks.step_measure"
    do_job(str(job), steps.LOSSES, step_measure.MEASURES)
    return 0, ""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The record of the toy pair in both dtypes."""
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_run_job", in_this_process)
        assert main([*TINY, "--device", "cpu", "--output", str(folder)]) == 0
    (path,) = folder.glob("*-step.json")
    return record.load(path)


def test_the_toy_pair_through_the_whole_command(data):
    names = [r["workload"]["name"] for r in data["results"]]
    assert names == ["tiny-12-float32", "tiny-12-bfloat16"]
    for result in data["results"]:
        workload = Workload.from_json(result["workload"])
        added = operations(workload)["total"] * (steps.LAYERS - 1) // steps.LAYERS
        assert result["products"]["operations"]["total"] == added
        assert result["products"]["total"] > 0
        assert list(result["providers"]) == list(steps.LOSSES)
        for entry in result["providers"].values():
            assert entry["status"] == "ok"
            time, held = entry["time"], entry["memory"]
            assert time["total"]["min"] > time["forward"]["min"] > 0
            assert len(time["total"]["all"]) == 1
            check = time["check"]
            assert check["error"] <= check["limit"]
            assert check["gradient"] <= check["gradient_limit"]
            assert held["beyond_interpreter"] >= held["beyond_inputs"] >= 0
            weights = held["gradients"]
            assert held["inputs"] > weights  # the teacher's too
            assert held["optimizer"] >= 2 * weights
    assert runner.peaks_on_record(data) == []  # the planner predicts the loss alone
    assert compare(data, data).regressions.empty


def test_tables_and_picture_of_a_record(data, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{docs.BEGIN}\n{docs.END}\n")
    write(tmp_path / "results" / "a.json", data)
    image = tmp_path / "image.svg"
    command = ["table", "--page", str(page), "--image", str(image)]
    command += ["--results", str(tmp_path / "results")]
    assert main(command) == 0
    assert main([*command, "--check"]) == 0
    text = page.read_text()
    for title in (report.SECONDS, report.MEMORY, report.ADDED):
        assert f"{title}:" in text
    assert "| tiny | 12 | bfloat16 |" in text
    assert "- tiny: GPT-2 of toy size" in text
    svg = ElementTree.parse(tmp_path / docs.STEPS_IMAGE).getroot()
    texts = ["".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"FDD, ours", "output KD, dense", "tiny, float32", "12 tokens"} <= set(texts)
    assert main(["report", "--no-plots", str(tmp_path / "results" / "a.json")]) == 0
    assert report.ADDED in capsys.readouterr().out


def test_what_fdd_adds_is_the_difference_within_rounds(data):
    result = copy.deepcopy(data["results"][0])
    for name, times in (("kd-ours", [1.0, 3.0, 2.0]), ("fdd-ours", [1.5, 3.25, 3.0])):
        result["providers"][name]["time"]["total"]["all"] = times
    result["products"] |= {"total": 0.25, "total_min": 0.2, "total_max": 0.3}
    assert report.added(result, "ours") == [0.5, 0.25, 1.0]
    (_, _, (_, table)) = report.tables({"results": [result]})
    assert table["the limit"].tolist() == ["250 ms (200 to 300)"]
    assert table["ours / limit"].tolist() == ["2.00"]
    assert table["ours"].tolist() == ["500 ms (250 to 1000)"]


def larger_loss(loss):
    """A loss that is a twentieth too large: its gradient is within what rounding explains."""
    return 1.05 * loss


def larger_gradient(loss):
    """The same loss with a gradient that is a tenth too large."""
    return loss.detach() + 1.1 * (loss - loss.detach())


@pytest.mark.parametrize(
    ("dtype", "wrong", "reason"),
    [
        ("bfloat16", larger_loss, "loss differs"),
        ("float32", larger_gradient, "gradient differs by"),
    ],
)
def test_losses_that_differ_are_refused_before_they_are_timed(
    tmp_path, monkeypatch, capsys, dtype, wrong, reason
):
    """Which of the two is wrong is not known: both are refused, and output KD is measured."""
    right, timed = steps.fused_loss, []

    def changed(models, options):
        loss = right(models, options)
        return loss if options == steps.KD else wrong(loss)

    def train(models, provider, device):
        timed.append(provider.name)
        return 0.1, 0.2

    losses = {
        name: replace(provider, loss=changed if provider.loss is right else provider.loss)
        for name, provider in steps.LOSSES.items()
    }
    monkeypatch.setattr(steps, "LOSSES", losses)
    monkeypatch.setattr(step_measure, "train", train)
    monkeypatch.setattr(runner, "_run_job", in_this_process)
    arguments = [*TINY, "--dtypes", dtype, "--device", "cpu", "--output", str(tmp_path)]
    assert main(arguments) == 1
    assert capsys.readouterr().out.count(report.MEMORY) == 1  # one step: its tables once
    (path,) = tmp_path.glob("*-step.json")
    (result,) = record.load(path)["results"]
    entries = result["providers"]
    assert {name for name, e in entries.items() if e["status"] == "refused"} == {
        "fdd-dense",
        "fdd-ours",
    }
    assert not {"fdd-dense", "fdd-ours"} & set(timed)
    assert entries["fdd-ours"]["reason"].startswith(f"the timed call's {reason}")
    assert entries["kd-ours"]["time"]["total"]["median"] == 0.2
    (line, _) = report.reasons({"results": [result]})
    assert line.startswith(f"tiny-12-{dtype}, fdd-dense: refused: the timed call's {reason}")
    (_, _, (_, table)) = report.tables({"results": [result]})
    assert table["ours"].tolist() == ["-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "nonsense"], "unknown pair 'nonsense': choose from gpt2, llama, tiny"),
        (["--tokens", "1"], "--tokens 1 must be at least 2"),
        (["--dtypes", "int8"], "dtype 'int8' is not one of float32"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, message):
    assert main([*TINY, "--output", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pair_has_a_toy_of_its_family(dtype):
    """The first step of a memory process runs it, and the paper's layers exist in it. Its loss is
    compared narrowly enough to catch one that is a twentieth off.
    """
    for name, pair in steps.PAIRS.items():
        models = steps.Models(pair.toy, (1, 4), dtype, CPU)
        assert models.layers({}) == ((1, 2, 3, 4), (1, 2, 3, 4)), name
        for options in (steps.KD, {}):
            losses = (steps.dense_loss, steps.fused_loss)
            dense, ours = (float(loss(models, options).detach()) for loss in losses)
            limit = step_measure.allowed_difference(models, options, dense)
            assert abs(dense - ours) <= limit < dense / 20, name


@pytest.mark.slow
def test_a_measurement_in_a_process_of_its_own(tmp_path):
    """One memory process as the command starts it."""
    (workload,) = steps.workloads(["tiny"], [12], ["float32"])
    losses, settings = [steps.LOSSES["fdd-ours"]], {"threads": 1, "repeats": 1, "device": "cpu"}
    run = runner.Run(
        tmp_path, "step", [workload], losses, **settings, module="benchmarks.step_measure"
    )
    result = run._result(workload)
    assert run._job(workload, result, "memory", ["fdd-ours"]), result
    held = json.loads(json.dumps(result["providers"]["fdd-ours"]["memory"]))
    assert held["process_peak"] > held["beyond_interpreter"] >= held["beyond_inputs"]
