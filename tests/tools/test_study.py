"""The study of objectives: it resumes from its record, and its tables come from that alone."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from benchmarks import record, study, study_report
from benchmarks.__main__ import main
from fdd_kernels.common.student_t import t_quantile
from fdd_kernels.demo import corpus

PAGE = f"before\n{study_report.BEGIN}\nold\n{study_report.END}\nafter\n"
PLAN = [(setting.part, setting.key()) for setting in study.plan()]  # before `small` replaces it


@pytest.fixture(scope="module")
def small():
    """A plan of four runs of two steps and little text, and a folder with two of them done."""
    texts = corpus.standard_library_texts(held_out=True)[:10]
    size = {"hidden_size": 24, "num_layers": 5, "num_heads": 1, "learning_rate": 1e-3}
    budget = {"steps": 2, "batch_size": 1, "evaluations": 1, "evaluation_windows": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "standard_library_texts", lambda *, held_out: texts)
        patch.setattr(study, "BUDGETS", {"1x": budget})
        patch.setattr(study, "SIZES", {"small": size})
        patch.setattr(study, "SEEDS", 2)
        patch.setattr(study, "MAIN", ("output KD", "KD + trajectory"))
        patch.setattr(study, "VARIANTS", {})
        patch.setattr(study, "RATES", {})
        patch.setattr(study, "DEEP_RUNS", ())
        patch.setattr(study, "VARIANTS_AT", ((), "small"))
        yield


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    # the first group passes the limit
    assert main(["study", "--output", str(folder), "--minutes", "1e-9", "--threads", "1"]) == 0
    return folder


def copy(folder, tmp_path, change=lambda entries: None):
    """The record in another folder, with its lines changed."""
    entries = [json.loads(line) for line in (folder / study.FILE).read_text().splitlines()]
    change(entries)
    path = tmp_path / study.FILE
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_it_stops_after_the_minutes_and_resumes(done, tmp_path, capsys):
    path = copy(done, tmp_path)
    first = path.read_text()
    assert first.count("\n") == 2
    assert main(["study", "--list", "--output", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "main, 1x, small: 2 of 4 runs; missing: seeds 1 of all objectives" in listed
    assert main(["study", "--output", str(tmp_path), "--only", "4x", "--only", "seed 0"]) == 0
    assert "0 runs done, 0 missing" in capsys.readouterr().out
    assert main(["study", "--output", str(tmp_path), "--threads", "1"]) == 0
    assert "2 runs done, 0 missing" in capsys.readouterr().out
    assert path.read_text().startswith(first)  # untouched: nothing was run again
    assert path.read_text().count("\n") == 4
    assert main(["study", "--output", str(tmp_path)]) == 0
    assert "0 runs done, 0 missing" in capsys.readouterr().out


def test_a_line_is_small_and_says_its_conditions(done):
    for line in (done / study.FILE).read_text().splitlines():
        entry = json.loads(line)
        assert len(line) < 3000
        assert entry["setting"]["training"]["hidden_size"] == 24
        assert set(entry["material"]) == {"teacher", "text", "held_out_text"}
        assert entry["versions"]["torch"]
        assert entry["git"]["revision"]
        assert len(entry["run"]["window_kl"]) == 2


def test_an_objective_or_size_of_other_options_is_another_run(done, monkeypatch):
    settings = list(study.plan())
    assert len({setting.key() for setting in settings}) == len(settings) == 4
    known = study.Record(done)
    assert known.of(settings[0])
    other = study.CONFIGS["KD + trajectory"]
    monkeypatch.setattr(study, "CONFIGS", study.CONFIGS | {"output KD": other})
    assert settings[0].key() == settings[1].key()  # names do not identify a run


def test_all_settings_of_the_plan_differ():
    assert len({key for _, key in PLAN}) == len(PLAN) > 200
    parts = [part for part, _ in PLAN]
    assert parts == sorted(parts)  # the main grid first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[1]["material"].update(teacher="other"), r"line 2: teacher other is not \w+"),
        (lambda e: e[0].pop("run"), "line 1: is no run of the study"),
        (lambda e: [x["material"].update(text="other") for x in e], "this machine: text .* other"),
    ],
)
def test_a_foreign_or_damaged_record_is_refused_and_not_touched(
    done, tmp_path, capsys, change, message
):
    path = copy(done, tmp_path, change)
    before = path.read_text()
    assert main(["study", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert str(path) in error
    assert path.read_text() == before


def test_tables_and_plots_come_from_the_record(done, tmp_path, capsys):
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    page.write_text(PAGE)
    assert main(["study", "--report", "--output", str(done), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| KD + trajectory | 1 |" in text
    assert "Beyond the noise: nothing." in text  # one seed
    assert "- main, 1x, small: 2 of 4 runs; missing" in text
    images = sorted(path.name for path in (page.parent / "images").iterdir())
    assert images == ["study_differences.svg", "study_seconds.svg"]
    page.write_text("no markers")
    assert main(["study", "--report", "--output", str(done), "--page", str(page)]) == 2
    assert "needs the lines" in capsys.readouterr().err
    with pytest.raises(record.RecordError, match="has no run"):
        study_report.text(study.Record(tmp_path))


def made_up(kl):
    """Runs of one budget and size: {(objective, seed): (KL of each window)}."""
    rows = [
        {"objective": o, "seed": s, "windows": np.array(v), "budget": "1x"}
        for (o, s), v in kl.items()
    ]
    return study_report.pd.DataFrame(rows)


def test_a_difference_is_paired_and_counts_only_beyond_both_spreads():
    """By hand: differences of seeds -0.1 and -0.3 have mean -0.2 and standard deviation 0.1414, so
    the half interval is 12.706 * 0.1414 / sqrt(2) = 1.2706.
    """
    runs = made_up(
        {
            ("output KD", 0): (2.0, 3.0),
            ("output KD", 1): (5.0, 6.0),
            ("x", 0): (1.9, 2.9),
            ("x", 1): (4.7, 5.7),
        }
    )
    found = study_report.difference(runs, "x", "output KD")
    assert found.mean == pytest.approx(-0.2)
    assert found.over_seeds == pytest.approx(1.2706, rel=1e-4)
    assert found.over_windows == pytest.approx(0, abs=1e-12)
    assert not found.exceeds_noise
    assert study_report.Difference(-0.2, 0.1, 0.1).exceeds_noise
    assert not study_report.Difference(-0.2, 0.1, 0.3).exceeds_noise
    assert study_report.difference(runs, "x", "y") is None


@pytest.mark.parametrize(
    ("freedom", "expected"), [(4, 2.776), (10, 2.228), (30, 2.042), (47, 2.012)]
)
def test_the_quantile_of_t(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=1e-3)
