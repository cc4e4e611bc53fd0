"""FDDTrainer in two gloo processes: best checkpoint, evaluation, parameters without a gradient."""

import pytest
import torch

from fdd_kernels import Distiller
from tests.distributed.trainer_worker import HELD_OUT, STREAMED
from tests.support.hf_models import tiny_model
from tests.support.processes import finish_well, start
from tests.support.training import CONFIG, TERMS, examples, pad

WORKER = "tests.distributed.trainer_worker"


def run(kind, folder):
    finish_well(start(WORKER, kind, 2, folder))
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_every_process_has_the_best_student_and_evaluates_each_row_once(tmp_path):
    """Five rows for two processes with two at a time: three of the last four rows are there a
    second time.
    """
    first, second = run("best-first", tmp_path)
    assert first["best"] == second["best"] == str(tmp_path / "run" / "checkpoint-1")
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    student = tiny_model("llama", depth=3, seed=1)
    start = student.state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in first["weights"].items())
    student.load_state_dict(first["weights"])
    distiller = Distiller(student, tiny_model("gpt2", depth=3, seed=2), CONFIG)
    for key, rows in (("metrics", examples(HELD_OUT)), ("stream", examples(STREAMED, seed=3))):
        with torch.no_grad():
            terms = distiller(pad(rows))
        for found in (first[key], second[key]):
            for name in ("loss", *TERMS):
                assert found[f"eval_{name}"] == pytest.approx(
                    float(getattr(terms, name)), rel=1e-5
                ), (key, name)


@pytest.mark.slow
def test_options_that_change_are_the_same_in_every_process_and_resumed(tmp_path):
    found = run("changing", tmp_path)
    expected = found[0]["whole"]
    assert expected["state"]["schedules"]["teacher_mix"]["t"] > 0.41
    assert expected["state"]["schedules"]["gradient_balance"]["weights"]["trajectory"] != 1
    for one in [process[kind] for process in found for kind in ("whole", "resumed")]:
        assert one["state"] == expected["state"]
        for name, weight in expected["weights"].items():
            assert torch.equal(one["weights"][name], weight), name


@pytest.mark.slow
def test_parameters_that_the_loss_does_not_reach(tmp_path):
    """FDDTrainer tells DistributedDataParallel of them; in a hand-written loop an error does,
    before torch would hang.
    """
    for found in run("partial", tmp_path):
        assert found["steps"] == {False: 3, True: 3}
        assert "10 parameters that train" in found["refused"]
        assert "find_unused_parameters=True" in found["refused"]
