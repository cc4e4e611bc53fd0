"""The benchmark suite: its command line on tiny shapes, records, comparison, resumption, report."""

import copy
import json
import shutil
import subprocess
import time
import types
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

pytest.importorskip("rich")
pytest.importorskip("pandas")
pytest.importorskip("jinja2")

from benchmarks import record, report
from benchmarks.__main__ import main
from benchmarks.gemms import operations
from benchmarks.measure import MEMORY_IN_USE
from benchmarks.providers import PROVIDERS, of_workload
from benchmarks.report import docs
from benchmarks.report.compare import compare
from benchmarks.runner import loss_shape
from benchmarks.workloads import GPT2, SUITES, Workload, suite
from fdd_kernels.backends import BACKENDS, preference


def spread(median, noise=0.02):
    return {
        "median": median,
        "min": median * (1 - noise),
        "max": median * (1 + noise),
        "all": [median],
    }


def entry(total=2.0, memory=100 * 2**20, status="ok", reason=None):
    ok = status == "ok"
    return {
        "computes": "the whole objective",
        "status": status,
        "reason": reason,
        "predicted_memory": 105 * 2**20,
        "time": {
            "forward": spread(total / 2),
            "total": spread(total),
            "warm_up": total,
            "tokens_per_second": 4.0,
            "check": {"passed": True},
        }
        if ok
        else None,
        "memory": {"beyond_inputs": memory, "gradients": 2**20} if ok else None,
        "accuracy": {
            "value_error": 1e-7,
            "grad_hidden_relative": 1e-6,
            "passed": True,
            "of_budget": 0.5,
        }
        if ok
        else None,
    }


def synthetic(workload=GPT2, **providers):
    products = {
        "forward": 0.4,
        "total": 1.0,
        "input_dtype_total": 1.0,
        "operations": {"forward": 1, "total": 10**9},
    }
    return {
        "format": record.FORMAT,
        "suite": "quick",
        "date": "2026-01-02T03:04:05+00:00",
        "device": "cpu",
        "threads": 2,
        "machine": {"processor": "some processor", "cores": 2},
        "versions": {"torch": "2", "fdd_kernels": "0"},
        "git": {"revision": "abcdef0123456789", "changed": False},
        "sources": "0",
        "interruptions": 0,
        "results": [
            {
                "workload": json.loads(json.dumps(workload.to_json())),
                "products": products,
                "done": [],
                "providers": providers or {"dense": entry(8.0), "cpu": entry()},
            }
        ],
    }


def write(path, data):
    record.save(path, data)
    return path


@pytest.mark.parametrize("name", SUITES)
def test_workloads_survive_json_and_have_unique_names(name):
    workloads = suite(name)
    assert len({w.name for w in workloads}) == len(workloads)
    for workload in workloads:
        assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload


def test_operations_are_the_unavoidable_ones():
    r, v, ds, dt, layers = (
        GPT2.rows,
        GPT2.columns,
        GPT2.student_width,
        GPT2.teacher_width,
        GPT2.layers,
    )
    assert operations(GPT2) == {
        "forward": layers * 2 * r * v * (ds + dt),
        "total": layers * 2 * r * v * (3 * ds + dt),
    }


@pytest.mark.slow
def test_run_end_to_end(tmp_path, capsys):
    """Measure one tiny workload for real: record, table, plots, page."""
    arguments = [
        "run",
        "--suite",
        "tiny",
        "--workload",
        "gpt2",
        "--provider",
        "torch",
        "--provider",
        "triton",
    ]
    arguments += ["--threads", "1", "--output", str(tmp_path)]
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
    assert result["products"]["total"] > result["products"]["forward"] > 0
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
    arguments = [
        "run",
        "--suite",
        "tiny",
        "--workload",
        "kd",
        "--provider",
        "torch",
        "--provider",
        "dense",
        "--no-plots",
        "--output",
        str(tmp_path),
    ]
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
    arguments = [
        "run",
        "--suite",
        "tiny",
        "--workload",
        "kd",
        "--provider",
        "torch",
        "--provider",
        "dense",
        "--no-plots",
        "--output",
        str(tmp_path),
    ]
    assert main(arguments) == 1
    (path,) = tmp_path.glob("*-tiny.json")
    refused = record.load(path)["results"][0]["providers"]["dense"]
    assert (refused["status"], refused["time"], refused["memory"]) == ("refused", None, None)
    assert "12 times the budget" in refused["reason"]


def test_a_dead_process_marks_its_provider_and_spares_the_others(tmp_path, monkeypatch):
    """The first worker is killed as soon as it works on a provider; the next one ends well."""
    from benchmarks import runner

    (workload,) = [w for w in suite("tiny") if w.name == "kd"]
    run = runner.Run(
        tmp_path,
        "tiny",
        [workload],
        runner_providers("dense", "torch"),
        threads=1,
        repeats=1,
        device="cpu",
    )
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no benchmark record"),
        ("{}", "lacks format"),
        ("\x00\xff", "is not JSON"),
        (json.dumps(synthetic() | {"format": 99}), "has format 99"),
        (json.dumps(synthetic() | {"results": [{}]}), "damaged"),
    ],
)
def test_a_corrupt_record_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "record.json"
    path.write_text(text, encoding="latin-1")
    good = write(tmp_path / "good.json", synthetic())
    assert main(["compare", str(good), str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


def test_a_missing_record_is_named(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "a.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("new", "regressions", "code"),
    [
        ({"total": 2.0}, 0, 0),
        ({"total": 2.1}, 0, 0),  # apart, but below the threshold
        ({"total": 2.6}, 2, 1),  # forward, and forward + backward
        ({"total": 1.0}, 0, 0),
        ({"memory": 150 * 2**20}, 1, 1),
        ({"memory": 103 * 2**20}, 0, 0),
        ({"status": "refused", "reason": "wrong"}, 0, 1),
    ],
)
def test_comparison(tmp_path, new, regressions, code):
    old = synthetic(cpu=entry())
    changed = synthetic(cpu=entry(**new))
    result = compare(old, changed)
    assert len(result.regressions) == regressions
    assert (
        main(
            [
                "compare",
                str(write(tmp_path / "a.json", old)),
                str(write(tmp_path / "b.json", changed)),
            ]
        )
        == code
    )


def test_noise_is_no_regression():
    old, new = synthetic(cpu=entry()), synthetic(cpu=entry(2.6))
    new["results"][0]["providers"]["cpu"]["time"]["total"] = spread(2.6, noise=0.4)
    new["results"][0]["providers"]["cpu"]["time"]["forward"] = spread(1.3, noise=0.4)
    assert compare(old, new).regressions.empty


def test_comparison_says_what_else_differs():
    old, new = synthetic(cpu=entry(), dense=entry()), synthetic(cpu=entry(), torch=entry())
    new["versions"]["torch"] = "3"
    new["machine"]["processor"] = "another"
    result = compare(old, new)
    assert (result.only_old, result.only_new) == (["gpt2 / dense"], ["gpt2 / torch"])
    assert len(result.caveats) == 2


def test_growth_exponents():
    data = synthetic()
    data["results"] = []
    for rows in (10, 20, 40):
        workload = GPT2.to_json() | {
            "name": f"rows-{rows}",
            "rows": rows,
            "sweep": "rows",
            "group": "scaling",
        }
        data["results"].append(
            {
                "workload": workload,
                "products": None,
                "done": [],
                "providers": {"cpu": entry(rows**1.5)},
            }
        )
    (sweep,) = report.growth(report.figures(data)).itertuples()
    assert (sweep.sweep, sweep.provider) == ("rows", "cpu")
    assert sweep.total == pytest.approx(1.5)
    assert sweep.memory == pytest.approx(0)


@pytest.fixture
def paths(tmp_path):
    """Options of `table` and `check-records`: a folder of records, a page, a picture."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    names = {"results": tmp_path / "results", "page": page, "image": tmp_path / "new" / "image.svg"}
    return SimpleNamespace(
        **names, options=[x for name, path in names.items() for x in (f"--{name}", str(path))]
    )


def test_tables_are_generated_and_staleness_is_found(paths):
    write(paths.results / "a.json", synthetic())
    command = ["table", *paths.options]
    assert main([*command, "--check"]) == 1
    assert main(command) == 0
    assert main([*command, "--check"]) == 0
    text = paths.page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| dense | 8 s | 1.00x | 8.00 |" in text
    assert "| cpu | 2 s | 4.00x | 2.00 |" in text
    assert "| GEMMs only | 1 s | - | - |" in text
    assert not paths.image.exists()  # of the suite "full"
    newer = copy.deepcopy(synthetic(cpu=entry(3.0)))
    newer["date"] = "2026-02-02T03:04:05+00:00"
    write(paths.results / "0.json", newer)
    assert main([*command, "--check"]) == 1
    write(paths.results / "b.json", synthetic() | {"suite": "another"})
    assert main(command) == 0
    text = paths.page.read_text()
    assert "| 3 s |" in text  # the newest of its suite
    assert "4.00x" in text  # the only one of the other


def test_picture_of_the_suite_full(paths):
    names = ("dense", "dense-compile", "cpu", "torch", "trl", "liger")
    times = zip(names, (8.0, 5.0, 2.0, 3.0, 7.0, 6.0))
    full = synthetic(**{name: entry(total) for name, total in times}) | {"suite": "full"}
    write(paths.results / "a.json", full)
    assert main(["table", *paths.options]) == 0
    svg = ElementTree.parse(paths.image).getroot()
    texts = ["".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert [t for t in texts if t.endswith(" s") or " s " in t] == [
        "2 s",
        "5 s",
        "8 s",
        "6 s liger",
    ]
    assert any("some processor" in t for t in texts)
    assert any("python -m benchmarks run --suite full" in t for t in texts)
    assert svg.get("width")
    paths.image.write_text("another")
    assert main(["table", *paths.options, "--check"]) == 1


def test_table_without_record_or_markers(paths, capsys):
    paths.page.write_text("nothing")
    assert main(["table", *paths.options]) == 2
    assert "has no record" in capsys.readouterr().err
    write(paths.results / "a.json", synthetic())
    assert main(["table", *paths.options]) == 2
    assert "needs the lines" in capsys.readouterr().err


def test_records_are_checked_against_planner_and_tables(paths, capsys):
    from fdd_kernels.memory.loss import loss_memory

    measured = int(1.05 * loss_memory(loss_shape(GPT2), "cpu", threads=2).total)
    right = entry(memory=measured)
    right["memory"]["measure"] = MEMORY_IN_USE["cpu"]
    # the other entry has another measure and is skipped
    write(paths.results / "a.json", synthetic(cpu=right, dense=entry()))
    assert main(["check-records", *paths.options]) == 1
    assert capsys.readouterr().err.count("is stale") == 1
    assert main(["table", *paths.options]) == 0
    assert main(["check-records", *paths.options]) == 0
    assert "1 predictions of memory" in capsys.readouterr().out
    wrong = copy.deepcopy(right)
    wrong["memory"]["beyond_inputs"] = 2 * measured
    write(paths.results / "a.json", synthetic(cpu=wrong))
    assert main(["table", *paths.options]) == 0
    assert main(["check-records", *paths.options]) == 1
    assert "a.json: gpt2 / cpu: the planner predicts" in capsys.readouterr().err


@pytest.mark.slow
def test_records_of_yesterday_are_read(capsys):
    """Show every record of this repository, if there is one, and compare it with itself."""
    from benchmarks.report.page import render

    for path in sorted(record.RESULTS.glob("*.json")):
        data = record.load(path)
        text = render(data, [])
        for result in data["results"]:
            assert f"<h3>{result['workload']['name']}</h3>" in text, path
        assert report.conditions(data) in docs.details(data)
        assert main(["compare", str(path), str(path)]) == 0
        assert "0 of" in capsys.readouterr().out


def test_without_matplotlib_the_figures_are_shown(tmp_path, monkeypatch, capsys):
    import sys

    for name in ("benchmarks.report.page", "benchmarks.report.plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "a.json", synthetic())
    assert main(["report", str(path)]) == 0
    assert "matplotlib is missing; pip install matplotlib" in capsys.readouterr().out


def test_report_opens_in_a_browser(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.report.page import write_report

    page = write_report(synthetic(), tmp_path)
    browser = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if browser is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fdd_kernels benchmarks" in done.stdout
    assert done.stdout.count("<svg") >= 2
