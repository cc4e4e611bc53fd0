"""Reports of a training run: TensorBoard, progress bar, model cards."""

import pytest
from huggingface_hub import ModelCard

from tests.support.training import TERMS, examples, trainer


def test_tensorboard_shows_every_term(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    run = trainer(
        tmp_path,
        train=examples([9] * 8),
        held_out=examples([9] * 4, seed=1),
        max_steps=2,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = {log["step"]: log for log in run.state.log_history if "trajectory" in log}
    for name in ("loss", *TERMS):
        found = events.Scalars(f"train/{name}")
        assert [event.step for event in found] == [1, 2]
        assert found[0].value == pytest.approx(logged[1][name], rel=1e-5)
        assert len(events.Scalars(f"eval/{name}")) == 2


def test_the_progress_bar_tells_the_terms(tmp_path, capsys):
    trainer(tmp_path, train=examples([9] * 8), max_steps=1, disable_tqdm=False).train()
    shown = capsys.readouterr()
    assert "'trajectory'" in shown.out + shown.err
    assert "1/1" in shown.err


def test_the_model_card_says_how_it_was_distilled(tmp_path):
    run = trainer(
        tmp_path, train=examples([9] * 8), held_out=examples([9] * 4, seed=1), max_steps=1
    )
    run.teacher.config._name_or_path = str(tmp_path)  # loaded from a directory of this machine
    run.train()
    run.evaluate()
    run.create_model_card(model_name="small")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"fdd", "distillation"} <= set(card.data.tags)
    assert "## Distillation" in card.text
    assert f"Teacher: {tmp_path.name}\n" in card.text
    assert "ce_weight=0.5" in card.text
    assert "1 with 1, 2 with 2" in card.text
    assert str(tmp_path) not in card.text
