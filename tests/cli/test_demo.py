"""The demo: its text, its teacher, and a run of a few steps with everything it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from transformers import AutoTokenizer, LlamaForCausalLM

from fdd_kernels.demo import run as demo
from fdd_kernels.demo.corpus import (
    is_held_out,
    random_windows,
    standard_library_texts,
    token_stream,
    train_tokenizer,
)
from fdd_kernels.demo.students import OBJECTIVES, Budget, Evaluation, train_students
from fdd_kernels.demo.teacher import (
    RECORD_FILE,
    SHIPPED_TEACHER,
    held_out_loss,
    held_out_windows,
    llama,
    train_teacher,
)
from fdd_kernels.objectives.fdd.options import FDDConfig


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return token_stream(
        AutoTokenizer.from_pretrained(SHIPPED_TEACHER), standard_library_texts(held_out=True)
    )


def test_files_are_split_by_path_alone():
    found = [i for i in range(100) if is_held_out(Path(f"package/module_{i}.py"))]
    assert found == [36, 38, 64, 66]  # by SHA-256: of every machine, Python and release
    parts = [is_held_out(Path(f"package/module_{i}.py")) for i in range(2000)]
    assert 40 < sum(parts) < 130  # one in 25, binomial: 80 +- 9
    training, held = standard_library_texts(held_out=False), standard_library_texts(held_out=True)
    assert len(training) > 5 * len(held) > 0
    assert not set(training) & set(held)


def test_windows_are_slices_of_the_stream():
    stream = torch.arange(100)
    windows = random_windows(stream, 50, 10, torch.Generator().manual_seed(0))
    assert windows.shape == (50, 10)
    assert torch.equal(windows - windows[:, :1], torch.arange(10).expand(50, 10))
    assert windows.min() >= 0
    assert windows.max() <= 99


def test_a_tokenizer_gives_the_text_back():
    texts = ["def f(x):\n    return x + 1\n", "for i in range(10):\n\tprint('ü', i)\n"]
    tokenizer = train_tokenizer(texts, 300)
    stream = token_stream(tokenizer, texts)
    assert tokenizer.decode(stream).split(tokenizer.eos_token)[:2] == texts


@pytest.mark.slow
def test_the_shipped_teacher_is_small_and_good(held_out):
    size = sum(path.stat().st_size for path in SHIPPED_TEACHER.rglob("*") if path.is_file())
    assert size <= 12e6
    assert (SHIPPED_TEACHER / "model.safetensors").is_file()
    record = json.loads((SHIPPED_TEACHER / RECORD_FILE).read_text())
    teacher = LlamaForCausalLM.from_pretrained(SHIPPED_TEACHER, dtype=torch.float32)
    loss = held_out_loss(teacher, held_out_windows(held_out, 16))
    # 16 windows of other text than the record's 128, on another Python version perhaps; a uniform
    # guess is 7.6 nats.
    assert abs(loss - record["held_out_loss"]) < 0.5


@pytest.mark.slow
def test_a_teacher_can_be_trained_and_resumed(tmp_path, monkeypatch):
    texts = standard_library_texts(held_out=True)[:3]
    monkeypatch.setattr("fdd_kernels.demo.teacher.standard_library_texts", lambda held_out: texts)
    # no compiler: eager
    monkeypatch.setattr("fdd_kernels.demo.teacher.shutil", SimpleNamespace(which=lambda name: None))
    first = train_teacher(tmp_path / "first", steps=2, batch_size=1)
    second = train_teacher(
        tmp_path / "second", steps=1, batch_size=1, start_from=tmp_path / "first"
    )
    assert second["before"]["tokens_seen"] == first["tokens_seen"] == 2 * 256
    assert second["tokens_seen"] == 3 * 256
    assert LlamaForCausalLM.from_pretrained(tmp_path / "second").config.num_hidden_layers == 10


def test_a_short_run_writes_numbers_and_a_page(tmp_path, monkeypatch, capsys):
    texts = standard_library_texts(held_out=True)[:20]
    monkeypatch.setattr(demo, "standard_library_texts", lambda *, held_out: texts)
    budget = Budget(steps=2, batch_size=1, evaluations=2, evaluation_windows=2)
    monkeypatch.setattr(demo, "QUICK", budget)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 2)
    result = demo.run_demo(tmp_path / "out", quick=True, seeds=2)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["objective"] for row in metrics["rows"]] == list(OBJECTIVES)
    assert len(metrics["runs"]) == 2 * len(OBJECTIVES)
    for run in metrics["runs"]:
        assert run["steps"] == [1, 2]
        lists = ("held_out_loss", "held_out_kl", "seconds", "cpu_seconds", "teacher_seconds")
        assert all(len(run[name]) == 2 for name in lists)
        assert all(0 < run[name][0] < run[name][1] for name in lists[2:])
        # the mean over windows of one length is the mean over tokens; so is the last "layer"
        assert sum(run["window_kl"]) / 2 == pytest.approx(run["held_out_kl"][-1], rel=1e-6)
        assert len(run["window_kl"]) == 2
        assert run["layer_kl_after"][-1] == pytest.approx(run["held_out_kl"][-1], rel=1e-4)
        assert len(run["layer_kl_before"]) == len(run["layer_kl_after"]) == 4 + 1
        assert run["layer_kl_before"] != run["layer_kl_after"]
        assert len(run["window_kl_curve"]) == 2
        assert run["window_kl_curve"][-1] == run["window_kl"]
    # Same initial weights and batches within a seed: only the objective makes students differ.
    assert len({run["held_out_kl"][-1] for run in metrics["runs"] if run["seed"] == 0}) == len(
        OBJECTIVES
    )
    for row in metrics["rows"]:
        runs = [run for run in metrics["runs"] if run["objective"] == row["objective"]]
        kl = [run["held_out_kl"][-1] for run in runs]
        assert row["equal steps"]["kl"]["mean"] == pytest.approx(sum(kl) / 2)
        assert row["equal steps"]["kl_by_seed"] == pytest.approx(kl)
        assert row["equal steps"]["difference"].keys() == {"mean", "half"}
    assert len(result.markdown()) == len(metrics["markdown"]) == 2 + len(OBJECTIVES)
    assert {line.count("|") for line in metrics["markdown"]} == {1 + len(result.table()[0])}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3  # curves, bars, layers
    assert all(objective in page for objective in OBJECTIVES)
    assert not re.search(r'(src|href)="(?!#)', page)  # self-contained
    shown = capsys.readouterr()
    assert "full FDD" in shown.out
    for seed in (0, 1):  # a line at each evaluation
        assert f"seed {seed}, step 1: KL labels only" in shown.err


def test_objectives_can_be_named(tmp_path, monkeypatch):
    """The teacher runs for the student that needs most of it, wherever that stands."""
    texts = standard_library_texts(held_out=True)[:20]
    monkeypatch.setattr(demo, "standard_library_texts", lambda *, held_out: texts)
    budget = Budget(steps=2, batch_size=1, evaluations=1, evaluation_windows=2)
    monkeypatch.setattr(demo, "QUICK", budget)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 2)
    names = ["full FDD, weighted", "full FDD", "output KD"]
    result = demo.run_demo(tmp_path / "out", quick=True, seeds=1, objectives=names)
    assert list(result.comparison.runs) == names
    assert result.notes()[2].startswith("One seed")
    assert len({run.held_out_kl[-1] for run in result.runs}) == 3
    for wrong in ("half FDD", "output KD"):
        with pytest.raises(ValueError, match=rf"'{wrong}' is not one of 'labels only'.*weighted"):
            demo.run_demo(tmp_path / "out", objectives=["output KD", wrong])


def test_each_student_gets_the_layers_of_its_own_objective():
    """Students of unlike layers side by side learn as each alone."""
    torch.manual_seed(0)
    teacher = llama(hidden_size=32, num_layers=6, num_heads=2).eval().requires_grad_(False)
    stream = torch.randint(0, 2048, (1000,))
    evaluation = Evaluation(teacher, held_out_windows(stream, 1))
    configs = {
        "output KD": FDDConfig.paper(alpha=0.0, beta=0.0),
        "full": FDDConfig.paper(),
        "two layers": FDDConfig.paper(num_layers=2),
        "raw": FDDConfig.paper(apply_final_norm=False),
    }
    budget = Budget(steps=1, batch_size=1, hidden_size=32, num_heads=2, evaluations=1)

    def train(objectives):
        activity = SimpleNamespace(update=lambda step, terms: None)
        runs, _ = train_students(teacher, stream, evaluation, budget, 0, activity, objectives)
        return [run.layer_kl_after for run in runs]

    together = train(configs)
    assert together == [train({name: config})[0] for name, config in configs.items()]
    assert len({tuple(kl) for kl in together}) == len(configs)


@pytest.mark.slow
def test_numbers_do_not_depend_on_processes(tmp_path, monkeypatch):
    texts = standard_library_texts(held_out=True)[:20]
    monkeypatch.setattr(demo, "standard_library_texts", lambda *, held_out: texts)
    budget = Budget(steps=2, batch_size=1, evaluations=1, evaluation_windows=2)
    monkeypatch.setattr(demo, "QUICK", budget)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 2)
    seen = []
    for threads in (1, 2):
        monkeypatch.setattr(demo.torch, "get_num_threads", lambda threads=threads: threads)
        result = demo.run_demo(tmp_path, quick=True, seeds=2, objectives=["full FDD", "output KD"])
        assert f"{threads} process" in result.machine
        seen.append([(run.seed, run.objective, run.window_kl) for run in result.runs])
    assert seen[0] == seen[1]
    assert len(result.samples) == 4  # the beginning, the teacher and two students


def test_without_a_teacher_it_says_what_to_do(tmp_path, monkeypatch):
    """As in an installed package, which does not hold it."""
    monkeypatch.setattr(demo, "SHIPPED_TEACHER", tmp_path / "none")
    with pytest.raises(ValueError, match=r"in a clone .*--teacher.*--retrain-teacher"):
        demo.run_demo(tmp_path / "out")
    with pytest.raises(ValueError, match=r"none holds no record.json"):
        demo.run_demo(tmp_path / "out", teacher=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_seeds_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="seeds=0"):
        demo.run_demo(tmp_path, seeds=0)
