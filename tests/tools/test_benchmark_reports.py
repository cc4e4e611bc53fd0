"""Records of the benchmark suite: comparison, tables, the README's picture, the HTML page."""

import copy
import json
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

pytest.importorskip("rich")
pytest.importorskip("pandas")
pytest.importorskip("jinja2")

from benchmarks import record, report
from benchmarks.__main__ import main
from benchmarks.measure import MEMORY_IN_USE
from benchmarks.providers import NO_DERIVATIVE
from benchmarks.report import docs
from benchmarks.report.compare import compare
from benchmarks.runner import loss_shape
from benchmarks.workloads import GPT2
from tests.support.benchmark_records import entry, spread, synthetic, write


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
    paths = [write(tmp_path / name, data) for name, data in (("a", old), ("b", changed))]
    assert main(["compare", *map(str, paths)]) == code


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
        point = replace(GPT2, name=f"rows-{rows}", rows=rows, sweep="rows", group="scaling")
        data["results"] += synthetic(point, cpu=entry(rows**1.5))["results"]
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
    assert "| gpt2 | dense | 8 s (7.84 to 8.16) | 1.00x | 8.00 | 100 MiB | 1.0e-07 |" in text
    assert "| gpt2 | cpu | 2 s (1.96 to 2.04) | 4.00x | 2.00 |" in text
    assert "| gpt2 | limit (torch.mm) | 1 s | - | - |" in text
    assert not paths.image.exists()  # of the suite "full"
    newer = copy.deepcopy(synthetic(cpu=entry(3.0)))
    newer["date"] = "2026-02-02T03:04:05+00:00"
    write(paths.results / "0.json", newer)
    assert main([*command, "--check"]) == 1
    write(paths.results / "b.json", synthetic() | {"suite": "another"})
    assert main(command) == 0
    text = paths.page.read_text()
    assert "| 3 s (" in text  # the newest of its suite
    assert "4.00x" in text  # the only one of the other


def of_processor(total, date, **machine):
    """A record of one time of the backend cpu, by its processor."""
    data = synthetic(cpu=entry(total)) | {"suite": "full", "date": f"2026-{date}T03:04:05+00:00"}
    return data | {"machine": {"processor": "a virtual one", "cores": 2} | machine}


def test_the_newest_of_each_kind_of_processor(paths):
    zen = {"generation": "Zen 5", "instructions": ["avx2", "avx512f", "avx512_bf16"]}
    hidden = {"generation": "Zen 5", "instructions": ["avx2", "avx512f"]}
    records = [
        of_processor(1.0, "01-01", **zen),
        of_processor(3.0, "03-01", **zen),
        of_processor(5.0, "02-01", **hidden),
        of_processor(7.0, "04-01", **zen) | {"part": True},
        of_processor(9.0, "02-02", instructions=["avx2"]),
        of_processor(11.0, "02-03", gpu="H100", instructions=["avx2"]),
    ]
    for number, data in enumerate(records):
        write(paths.results / f"{number}.json", data)
    assert main(["table", *paths.options]) == 0
    text = paths.page.read_text()
    assert text.count("## Suite full\n") == 1
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    assert headings == [
        "### Zen 5, AVX-512",
        "### a virtual one, AVX2",
        "### H100",
        "### Zen 5, AVX-512 with bfloat16",
    ]
    shown = [n for n in (1, 3, 5, 7, 9, 11) if f"| cpu | {n} s (" in text]
    assert shown == [3, 5, 9, 11]
    assert "3 s" in paths.image.read_text()  # the newest of suite full
    assert record.newest(paths.results, "quick") is None


def test_one_table_says_what_providers_do_not_compute(paths):
    part = entry(4.0) | {"computes": f"{NO_DERIVATIVE}, plus something"}
    none = entry(status="unsupported", reason="has no soft cap")
    data = synthetic(dense=entry(8.0), trl=part, orda=part, liger=none)
    for rows in (8, 16):
        point = replace(GPT2, name=f"rows-{rows}", rows=rows, sweep="rows", group="scaling")
        times = {"dense": entry(4.0), "cpu": entry(0.0011 * rows)}
        data["results"] += synthetic(point, **times)["results"]
    lines = docs.details(data).splitlines()
    assert "- **gpt2**: GPT-2 from GPT-2 XL, the FDD paper's pair; " + GPT2.describe() in lines
    assert sum(line.startswith("| gpt2 | trl * | 4 s") for line in lines) == 1
    assert not any(line.startswith("| gpt2 | liger") for line in lines)
    assert f"- trl *, orda *: {part['computes']} (gpt2)" in lines
    assert "- liger: unsupported: has no soft cap (gpt2)" in lines
    expected = "| rows-8 | 1 s | 4 s (3.92 to 4.08) | 8.8 ms (8.62 to 8.98) | 0.01 |"
    assert lines[lines.index("| workload | limit | dense | cpu | cpu x limit |") + 2] == expected


def test_spread_keeps_the_unit_of_the_median():
    assert report.spread(0.95, 0.9, 1.19) == "950 ms (900 to 1190)"
    assert report.spread(1.0, None, None) == "1 s"


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
    error = capsys.readouterr().err
    assert "a.json: gpt2 / cpu: the planner predicts" in error
    assert "was measured of code for which it predicted 105.0 MiB" in error
    # The newest of a suite counts, on whatever processor.
    older = {"date": "2025-01-02T03:04:05+00:00", "machine": {"processor": "another", "cores": 2}}
    write(paths.results / "a.json", synthetic(cpu=wrong) | older)
    write(paths.results / "b.json", synthetic(cpu=right))
    assert main(["table", *paths.options]) == 0
    assert main(["check-records", *paths.options]) == 0


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
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fdd_kernels benchmarks" in done.stdout
    assert done.stdout.count("<svg") >= 2
