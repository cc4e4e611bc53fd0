"""The benchmark suite: workloads, tiny runs, refused and failed providers, resumption."""

import json
import subprocess
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("pandas")
pytest.importorskip("jinja2")

from benchmarks import record
from benchmarks.__main__ import main
from benchmarks.gemms import operations
from benchmarks.providers import PROVIDERS, of_workload
from benchmarks.workloads import GPT2, SUITES, Workload, suite
from fdd_kernels.backends import BACKENDS, preference
from tests.support.benchmark_records import entry


def run_tiny(workload, *providers):
    """Arguments that measure one workload of the suite tiny with some providers."""
    chosen = [f"--provider={name}" for name in providers]
    return ["run", "--suite", "tiny", "--workload", workload, *chosen]


@pytest.mark.parametrize("name", SUITES)
def test_workloads_survive_json_and_have_unique_names(name):
    workloads = suite(name)
    assert len({w.name for w in workloads}) == len(workloads)
    for workload in workloads:
        assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload


def test_operations_are_the_unavoidable_ones():
    r, v, layers = GPT2.rows, GPT2.columns, GPT2.layers
    ds, dt = GPT2.student_width, GPT2.teacher_width
    assert operations(GPT2) == {
        "forward": layers * 2 * r * v * (ds + dt),
        "total": layers * 2 * r * v * (3 * ds + dt),
    }


@pytest.mark.slow
def test_run_end_to_end(tmp_path, capsys):
    """Measure one tiny workload for real: record, table, plots, page."""
    arguments = [*run_tiny("gpt2", "torch", "triton"), "--threads", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    (path,) = tmp_path.glob("*-tiny.json")
    data = record.load(path)
    (result,) = data["results"]
    torch_entry, triton_entry = result["providers"]["torch"], result["providers"]["triton"]
    assert torch_entry["status"] == "ok"
    assert torch_entry["accuracy"]["passed"]
    assert torch_entry["time"]["check"]["passed"]
    assert torch_entry["time"]["total"]["min"] >= torch_entry["time"]["forward"]["min"] > 0
    assert len(torch_entry["time"]["total"]["all"]) == 2
    assert torch_entry["memory"]["beyond_inputs"] >= 0
    limit = result["products"]
    assert limit["total_max"] >= limit["total"] >= limit["total_min"] > 0
    assert limit["total"] > limit["forward"] > 0
    if data["device"] == "cpu":
        assert triton_entry["status"] == "missing"
        assert "GPU" in triton_entry["reason"]
    out = capsys.readouterr().out
    assert "missing" in out
    page = path.with_suffix("") / "report.html"
    text = page.read_text()
    assert text.count("<svg") >= 2
    assert "http://" not in text.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert not (tmp_path / record.PARTIAL).exists()


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A run whose measurements are made up, stopped in the second one."""
    from benchmarks import runner

    calls = []

    def measure(self, workload, result, what, names):
        calls.append((what, *names))
        if len(calls) == 2:
            raise KeyboardInterrupt
        for name in names:
            result["providers"][name][what] = entry()[what]
        return True

    monkeypatch.setattr(runner.Run, "_job", measure)
    arguments = [*run_tiny("kd", "torch", "dense"), "--no-plots", "--output", str(tmp_path)]
    assert main(arguments) == 130
    return arguments, calls


def test_an_interrupted_run_keeps_what_is_finished(unfinished, tmp_path, capsys):
    arguments, calls = unfinished
    kept = record.load(tmp_path / record.PARTIAL)
    assert kept["results"][0]["done"] == ["accuracy"]
    assert main(arguments) == 0
    assert [c[0] for c in calls] == ["accuracy", "time", "time", "memory", "memory"]
    assert "continuing" in capsys.readouterr().out
    (path,) = tmp_path.glob("*-tiny.json")
    assert record.load(path)["interruptions"] == 1
    assert record.load(path)["part"]
    with pytest.raises(record.RecordError, match="no record of a whole suite"):
        record.newest_of_each_suite(tmp_path)


def test_an_unfinished_run_of_other_settings_is_not_mixed_in(unfinished, tmp_path, capsys):
    arguments, _ = unfinished
    assert main([*arguments, "--repeats", "7"]) == 2
    assert "--fresh" in capsys.readouterr().err
    assert main([*arguments, "--repeats", "7", "--fresh"]) == 0


@pytest.mark.parametrize(
    "path",
    [
        "fdd_kernels/lens/divergences.py",
        "fdd_kernels/testing/__init__.py",
        "csrc/problem.h",
        "benchmarks/measure.py",
        "fdd_kernels/_C.so",
    ],
)
def test_an_unfinished_run_of_other_sources_is_not_continued(tmp_path, monkeypatch, path):
    """Any source of the package: budgets and divergences decide results and refusals."""
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for name in ("fdd_kernels/backends/cpu/operations.py", "benchmarks/README.md", path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    before = record.source_digest()
    (tmp_path / "benchmarks" / "README.md").write_text("after")
    assert record.source_digest() == before
    (tmp_path / path).write_text("after")
    assert record.source_digest() != before


def test_a_wrong_answer_has_no_figures(tmp_path, monkeypatch, capsys):
    from benchmarks import runner

    def measure(self, workload, result, what, names):
        for name in names:
            made = entry()[what]
            if what == "accuracy" and name == "dense":
                made |= {"passed": False, "of_budget": 12.0}
            result["providers"][name][what] = made
        return True

    monkeypatch.setattr(runner.Run, "_job", measure)
    arguments = [*run_tiny("kd", "torch", "dense"), "--no-plots", "--output", str(tmp_path)]
    assert main(arguments) == 1
    (path,) = tmp_path.glob("*-tiny.json")
    refused = record.load(path)["results"][0]["providers"]["dense"]
    assert (refused["status"], refused["time"], refused["memory"]) == ("refused", None, None)
    assert "12 times the budget" in refused["reason"]


@pytest.mark.slow
def test_a_dead_process_marks_its_provider_and_spares_the_others(tmp_path, monkeypatch):
    """The first worker is killed as soon as it works on a provider; the next one ends well."""
    from benchmarks import runner

    (workload,) = [w for w in suite("tiny") if w.name == "kd"]
    chosen, settings = runner_providers("dense", "torch"), {"threads": 1, "repeats": 1}
    run = runner.Run(tmp_path, "tiny", [workload], chosen, **settings, device="cpu")
    result = run._result(workload)

    def start(command, **options):
        """Start the worker; kill it once it says that it runs the dense loss."""
        job = json.loads(Path(command[-1]).read_text())
        process = subprocess.Popen(command, **options)
        while "dense" in job["providers"] and process.poll() is None:
            if '["running", "dense"]' in Path(job["events"]).read_text():
                process.kill()
            time.sleep(0.01)
        return process

    # of the runner alone: it has no other use for the module
    monkeypatch.setattr(runner, "subprocess", types.SimpleNamespace(Popen=start))
    run._shared(workload, result, "time")
    assert result["providers"]["dense"]["status"] == "failed"
    assert "memory runs out" in result["providers"]["dense"]["reason"]
    assert result["providers"]["torch"]["time"]


def runner_providers(*names):
    from benchmarks.providers import choose

    return choose(list(names))


def test_what_cannot_fit_is_not_run_and_says_why(tmp_path, monkeypatch):
    from benchmarks import runner

    (workload,) = [w for w in suite("limits") if w.name == "qwen-large"]
    chosen, settings = runner_providers("dense", "cpu"), {"threads": 2, "repeats": 1}
    for limit, status in ((20 * 2**30, "too large"), (2**40, "ok")):
        monkeypatch.setattr(runner, "memory_limit", lambda device, limit=limit: limit)
        run = runner.Run(tmp_path, "limits", [workload], chosen, **settings, device="cpu")
        dense = run._result(workload)["providers"]["dense"]
        assert dense["status"] == status
        assert status == "ok" or "logits and tensors of their size" in dense["reason"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads_choose_providers_by_name_and_kind(device):
    chosen, expected = runner_providers(*PROVIDERS), preference(device)[0]
    (pair,) = [w for w in suite("limits") if w.name == "limits-f32-frozen"]
    assert {p.name for p in of_workload(pair, chosen, device)} == {"dense", expected}
    swept = next(w for w in suite("full") if w.sweep)
    compiled = {"dense", "dense-compile", *BACKENDS}
    assert {p.name for p in of_workload(swept, chosen, device)} == compiled
    (swept,) = [w for w in suite("full") if w.name == "layers-9"]
    assert {p.name for p in of_workload(swept, chosen, device)} == {"dense", *BACKENDS}
    assert of_workload(GPT2, chosen, device) == chosen
    assert {p.color for p in chosen if p.kind == "backends"} == {b.color for b in BACKENDS.values()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "nonsense"], "unknown workload 'nonsense'"),
        (["--provider", "nonsense"], "unknown provider 'nonsense': choose from dense"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
    ],
)
def test_unknown_names_are_one_line(tmp_path, capsys, arguments, message):
    assert main(["run", "--suite", "tiny", "--output", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
