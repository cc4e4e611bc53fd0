"""The limit of the benchmarks: the GEMMs of a workload alone, by the faster of two libraries."""

import itertools

import pytest
import torch

pytest.importorskip("pandas")

from benchmarks import report, tiled_gemms
from benchmarks.gemms import GemmTimes, library_of
from benchmarks.inputs import build_problem
from benchmarks.tiled_gemms import BRGEMM, MM
from benchmarks.workloads import suite
from fdd_kernels.backends.cpu import extension
from fdd_kernels.common import processor
from tests.support.benchmark_records import entry, synthetic

TINY = {w.name: w for w in suite("tiny")}
GEMMS = ["student", "teacher", "grad_hidden", "grad_head"]
needs_brgemm = pytest.mark.skipif(
    tiled_gemms.why_no_brgemm(torch.device("cpu")) is not None, reason="no brgemm here"
)


def measured(name, seconds):
    """Measure the GEMMs of a tiny workload in three rounds; `seconds(n)` is the time of the nth."""
    gemms, count = GemmTimes(TINY[name], build_problem(TINY[name])), itertools.count()

    def timed(run):
        run()
        return seconds(next(count))

    for _ in range(3):
        gemms.measure(timed)
    gemms.drop_first()
    return gemms


@needs_brgemm
def test_the_fastest_way_counts(monkeypatch):
    """Ways take 1, 2, ... seconds in turn: two by torch.mm, then four by brgemm, of each GEMM."""
    monkeypatch.setattr(tiled_gemms, "libraries", lambda device, dtype: [BRGEMM])
    found = measured("gpt2", lambda n: 1.0 + n % 24 + n // 24 / 100).summary()
    assert list(found["seconds_of_one_layer"]) == GEMMS
    assert [len(ways) for ways in found["seconds_of_one_layer"].values()] == [6] * 4
    layers, firsts = TINY["gpt2"].layers, (1, 7, 13, 19)
    assert set(found["best"].values()) == {"float32 torch.mm ab"}
    assert found["total"] == pytest.approx(layers * (sum(firsts) + 4 * 0.015))
    assert found["total_min"] == pytest.approx(layers * (sum(firsts) + 4 * 0.01))
    assert found["total_max"] == pytest.approx(layers * (sum(firsts) + 4 * 0.02))
    assert found["by_library"] == {
        MM: pytest.approx(found["total"]),
        BRGEMM: pytest.approx(found["total"] + layers * 4 * 2),
    }
    backwards = measured("gpt2", lambda n: 100.0 - n % 24).summary()
    assert {library_of(way) for way in backwards["best"].values()} == {BRGEMM}
    assert backwards["total"] == pytest.approx(backwards["by_library"][BRGEMM])
    assert backwards["no_brgemm"] is None


@pytest.mark.parametrize("name", ["kd", "feature"])
def test_other_dtypes_and_feature_space(name):
    found = measured(name, lambda n: 1.0).summary()
    gemms = [n for n in GEMMS if name == "kd" or n != "teacher"]
    assert list(found["seconds_of_one_layer"]) == gemms
    assert found["total"] == len(gemms) * TINY[name].projected_layers
    dtypes = {way.split()[0] for way in found["seconds_of_one_layer"]["student"]}
    assert dtypes == {TINY[name].dtype, "float32"}
    assert found["input_dtype_total"] == found["total"]


def test_without_brgemm_the_limit_is_torch_mm(monkeypatch):
    monkeypatch.setattr(tiled_gemms, "why_no_brgemm", lambda device: "no such library")
    monkeypatch.setattr(tiled_gemms, "libraries", lambda device, dtype: [])
    found = measured("gpt2", lambda n: 1.0).summary()
    assert list(found["by_library"]) == [MM]
    assert found["no_brgemm"] == "no such library"


@needs_brgemm
def test_a_wrong_product_is_not_timed(monkeypatch):
    multiply = tiled_gemms._multiply

    def wrong(*arguments):
        return multiply(*arguments).mul_(1.01)

    monkeypatch.setattr(tiled_gemms, "_multiply", wrong)
    with pytest.raises(ValueError, match=r"differ by .*another FDD_KERNELS_GEMM"):
        measured("gpt2", lambda n: 1.0)


def test_why_there_is_no_brgemm(monkeypatch):
    assert tiled_gemms.why_no_brgemm(torch.device("cuda")) == "runs on a CPU"
    cpu = torch.device("cpu")
    for kernels, reason in (
        (None, "no compiler"),
        (type("Kernels", (), {"has_brgemm": lambda bf16: False}), "not run on this"),
    ):
        monkeypatch.setattr(extension, "kernels", kernels, raising=False)
        monkeypatch.setattr(extension, "why_missing", "no compiler", raising=False)
        assert reason in tiled_gemms.why_no_brgemm(cpu)


def test_tables_name_the_libraries():
    data = synthetic(cpu=entry(2.0))
    best = dict.fromkeys(GEMMS, "float32 brgemm ab rows") | {"grad_head": "float32 torch.mm ba"}
    data["results"][0]["products"] |= {
        "best": best,
        "total_min": 0.9,
        "total_max": 1.2,
        "by_library": {MM: 1.5, BRGEMM: 1.1},
    }
    (_, table), *_ = report.tables(data)
    rows = {row["provider"]: row for row in table.to_dict("records")}
    assert rows["limit"]["forward + backward"] == "1 s (0.9 to 1.2)"
    about = "brgemm: student's logits, teacher's logits, dH; torch.mm: dW"
    assert rows["limit"]["computes"] == f"the GEMMs alone by {about}; 1 GFLOP"
    assert rows["torch.mm alone"]["forward + backward"] == "1.5 s"
    assert rows["brgemm alone"]["forward + backward"] == "1.1 s"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id : GenuineIntel\ncpu family : 6\nmodel : 106\nflags : avx2", "Ice Lake"),
        ("vendor_id : AuthenticAMD\ncpu family : 26\nmodel : 2\n", "Zen 5"),
        ("vendor_id : GenuineIntel\ncpu family : 6\nmodel : 999\n", None),
        ("CPU implementer : 0x41\nFeatures : asimd\n", None),
        ("", None),
    ],
)
def test_generations_of_processors(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "Path", lambda name: tmp_path / "cpuinfo")
    assert processor.generation() == expected
