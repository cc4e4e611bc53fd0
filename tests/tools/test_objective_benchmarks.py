"""The suites of objectives: their dense forms compute what this package computes, and tables."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("pandas")
pytest.importorskip("jinja2")

from benchmarks import objectives, record, report
from benchmarks.accuracy import TimedCallCheck, small_check
from benchmarks.gemms import gemm_shapes, operations
from benchmarks.inputs import build_problem
from benchmarks.measure import Job, step, time_workload
from benchmarks.providers import PROVIDERS, of_workload
from benchmarks.report.compare import compare
from benchmarks.report.objectives import side_by_side
from benchmarks.runner import predicted_memory
from benchmarks.workloads import GPT2, Workload, suite
from fdd_kernels.backends import preference
from tests.support.benchmark_records import entry, spread, synthetic

CPU = torch.device("cpu")
SMALL = {"rows": 6, "columns": 97, "student_width": 16, "teacher_width": 24}
STREAMED = [w for w in suite("streamed") if w.in_overview]
POINTS = [w for w in suite("streamed") if w.group == "flatness"]
WORKLOADS = {w.name: w.resized(**SMALL) for w in (*suite("objectives"), *STREAMED)}


@pytest.mark.parametrize("name", WORKLOADS)
def test_dense_forms_compute_what_this_package_computes(name):
    """Before anything is timed: values and gradients, by the checks that refuse a provider."""
    workload = WORKLOADS[name]
    check, problem = small_check(workload, CPU), build_problem(workload)
    timed = TimedCallCheck(workload, problem)
    for provider in (PROVIDERS["dense"], PROVIDERS["dense-chunked"], PROVIDERS["torch"]):
        found = check.run(provider)
        assert found["passed"], (provider.name, found)
        gradients = step(provider, problem, workload.loss_options, CPU)[2]
        assert timed.run(provider, gradients)["passed"], provider.name
        assert bool(gradients) == objectives.OBJECTIVES[workload.objective].gradient


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_dense_form_of_something_else_is_refused(name, monkeypatch):
    """One that is a tenth too large."""
    workload = WORKLOADS[name]
    check = small_check(workload, CPU)
    check.budgets(workload.loss_options, 2**-24)
    provider = PROVIDERS["dense"]
    wrong = replace(
        provider,
        loss=lambda *call: 1.1 * provider.loss(*call),
        rows=lambda *call: 1.1 * provider.rows(*call),
    )
    assert not check.run(wrong)["passed"]


def test_every_divergence_is_measured():
    from fdd_kernels.lens.divergence_text import parse_divergence
    from fdd_kernels.lens.divergences import DIVERGENCES

    options = [w.loss_options.get("output_divergence", "kl") for w in WORKLOADS.values()]
    assert {parse_divergence(text).name for text in options} == set(DIVERGENCES)


def test_every_streamed_objective_is_measured():
    names = {"fused_contrastive_kd", "fused_relation_kd", "fused_attention_kd", "layer_costs"}
    assert {w.objective for w in STREAMED} == names | {"fused_sinkhorn_kd"}
    assert {w.objective for w in POINTS} == names


@pytest.mark.parametrize("name", ["infonce", "attention_causal", "layer_costs", "sinkhorn"])
def test_streamed_objectives_are_timed_and_checked(name):
    reported = {}
    providers = [PROVIDERS["dense"], PROVIDERS["torch"]]
    time_workload(Job(WORKLOADS[name], providers, 1, CPU, reported.__setitem__))
    for provider in providers:
        assert reported[provider.name]["check"]["passed"]
        assert len(reported[provider.name]["total"]["all"]) == 1


def test_a_call_beside_is_timed_in_the_same_rounds():
    reported = {}
    workload = WORKLOADS["weighted_cosine"]
    providers = [PROVIDERS["dense"], PROVIDERS["torch"]]
    time_workload(Job(workload, providers, 3, CPU, reported.__setitem__))
    assert len(reported["torch"]["beside"]["all"]) == len(reported["torch"]["total"]["all"]) == 3
    assert "beside" not in reported["dense"]
    assert workload.options_beside == {"derivative": "cosine"}


def test_memory_is_predicted_of_what_the_planner_knows():
    known = {
        (name, provider)
        for name in ("jsd", "fused_topk_kd")
        for provider in ("dense", "torch", "cpu")
        if predicted_memory(WORKLOADS[name], provider) is not None
    }
    assert known == {("jsd", "torch"), ("jsd", "cpu")}
    assert predicted_memory(GPT2, "dense") is not None


def test_gemms_are_those_of_the_objective():
    shapes = {name: set(gemm_shapes(w)) for name, w in WORKLOADS.items()}
    assert shapes["jsd"] == {"student", "teacher", "grad_hidden", "grad_head"}
    assert shapes["fused_topk_kd"] == {"student", "grad_hidden", "grad_head"}
    assert shapes["row_statistics"] == {"student", "teacher"}
    assert shapes["infonce"] == {"student", "grad_hidden", "grad_head"}
    assert shapes["contrastive_kl"] == shapes["jsd"]
    of_heads = {name: WORKLOADS[name] for name in ("attention", "attention_causal", "relation")}
    assert gemm_shapes(of_heads["attention"])["teacher"] == (6, 2, 6)
    assert gemm_shapes(of_heads["attention_causal"])["grad_head"] == (6, 3, 1)
    work = {name: operations(w)["total"] for name, w in of_heads.items()}
    assert work["relation"] == work["attention"] == 2 * work["attention_causal"]
    costs = replace(WORKLOADS["layer_costs"], teacher_layers=None)
    one = 2 * costs.rows * costs.columns * costs.teacher_width
    more = operations(WORKLOADS["layer_costs"])["forward"] - operations(costs)["forward"]
    assert more == 4 * one


def test_who_cannot_compute_an_objective_says_so():
    assert "other objectives" in PROVIDERS["liger"].unsupported(WORKLOADS["jsd"])
    assert PROVIDERS["torch"].unsupported(WORKLOADS["jsd"]) is None
    reason = PROVIDERS["cpu"].unsupported(WORKLOADS["fused_topk_kd"])
    assert reason is None or "Backends that can" in reason
    chosen = of_workload(WORKLOADS["jsd"], list(PROVIDERS.values()), "cpu")
    assert [p.name for p in chosen] == ["dense", "dense-compile", preference("cpu")[0]]


def test_the_report_has_one_table_and_the_ratios():
    workload = suite("objectives")[0]
    ours = entry(2.1)
    ours["time"]["beside"] = spread(2.0)
    data = synthetic(workload, dense=entry(8.0), **{"dense-compile": entry(4.0)}, cpu=ours)
    (row,) = side_by_side(data).to_dict("records")
    assert row["objective"] == "weighted_cosine"
    assert row["backend"] == "cpu"
    times = [row[name] for name in ("forward + backward", "dense", "torch.compile", "limit")]
    assert times == ["2.1 s (2.06 to 2.14)", "8 s (7.84 to 8.16)", "4 s (3.92 to 4.08)", "1 s"]
    assert row["dense: memory"] == "100 MiB"
    expected = "weighted_cosine, cpu: 1.050 times the time of derivative=cosine, called in turn"
    assert expected in report.notes(data)
    assert side_by_side(synthetic()).empty


def test_memory_is_shown_against_what_it_does_not_grow_with(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.report.plots import write_plots

    data = synthetic(torch=entry(2.0))
    data["results"] = [
        synthetic(point, torch=entry(2.0, memory=n * 2**20))["results"][0]
        for n, point in enumerate(POINTS, 100)
    ]
    lines = [line for line in report.notes(data) if line.startswith("memory of ")]
    assert len(lines) == len(POINTS)
    expected = (
        "memory of fused_contrastive_kd, torch, R=C=4096: 100 MiB beyond inputs, 99 MiB of it"
    )
    assert lines[0].startswith(expected)
    assert any("layer_costs, torch, Ls x Lt=8 x 16: " in line for line in lines)
    assert tmp_path / "flatness.svg" in write_plots(data, tmp_path)
    assert side_by_side(data).empty


def test_sizes_that_an_objective_does_not_have_are_refused():
    with pytest.raises(ValueError, match="rows and columns are positions"):
        replace(WORKLOADS["relation"], rows=5)
    assert WORKLOADS["relation"].with_rows(5).columns == 5


def test_records_without_the_fields_of_today_are_compared(tmp_path):
    old, new = synthetic(), synthetic(cpu=entry(3.0), dense=entry(8.0))
    for name in ("objective", "tensors", "beside", "teacher_layers", "heads"):
        del old["results"][0]["workload"][name]
    record.save(tmp_path / "old.json", old)
    old = record.load(tmp_path / "old.json")
    assert Workload.from_json(old["results"][0]["workload"]) == GPT2
    result = compare(old, new)
    assert not result.caveats
    assert len(result.regressions) == 2
