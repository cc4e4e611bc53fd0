"""FDDTrainer in two gloo processes: best checkpoint, evaluation, parameters without a gradient,
generated text.
"""

import pytest
import torch

from fdd_kernels import Distiller
from fdd_kernels.integrations.streamed_metrics import watching
from tests.distributed.trainer_worker import HELD_OUT, KINDS, STREAMED, features
from tests.support.hf_models import tiny_model
from tests.support.processes import finish_well, start
from tests.support.training import CONFIG, examples, pad

WORKER = "tests.distributed.trainer_worker"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder, and the results of both processes by kind."""
    folder = tmp_path_factory.mktemp("found")
    finish_well(start(WORKER, ",".join(KINDS), 2, folder))
    return folder, {
        kind: [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]
        for kind in KINDS
    }


@pytest.mark.slow
def test_every_process_has_the_best_student_and_evaluates_each_row_once(found):
    """Five rows for two processes with two at a time: three of the last four rows are there a
    second time.
    """
    folder, results = found
    first, second = results["best-first"]
    assert first["best"] == second["best"] == str(folder / "best-first/run/checkpoint-1")
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    student = tiny_model("llama", depth=3, seed=1)
    start = student.state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in first["weights"].items())
    student.load_state_dict(first["weights"])
    distiller = Distiller(student, tiny_model("gpt2", depth=3, seed=2), CONFIG)
    for key, rows in (("metrics", examples(HELD_OUT)), ("stream", examples(STREAMED, seed=3))):
        with torch.no_grad(), watching(distiller) as watched:
            terms = distiller(pad(rows))
        expected = {name: float(value) for name, value in terms.named().items()}
        expected |= watched.results(lambda tensor, _: tensor)
        assert {"perplexity", "accuracy", "kl", "kl_layer_1"} <= expected.keys()
        for metrics in (first[key], second[key]):
            for name, value in expected.items():
                assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), (key, name)


@pytest.mark.slow
def test_options_that_change_are_the_same_in_every_process_and_resumed(found):
    processes = found[1]["changing"]
    expected = processes[0]["whole"]
    assert expected["state"]["schedules"]["teacher_mix"]["t"] > 0.41
    assert expected["state"]["schedules"]["gradient_balance"]["weights"]["trajectory"] != 1
    for one in [process[kind] for process in processes for kind in ("whole", "resumed")]:
        assert one["state"] == expected["state"]
        for name, weight in expected["weights"].items():
            assert torch.equal(one["weights"][name], weight), name


@pytest.mark.slow
def test_a_projection_has_the_gradient_of_all_processes(found, tmp_path):
    expected = features(tmp_path, size=4)["weights"]["weight"]
    for process in found[1]["features"]:
        # float32 sums over tokens in another order.
        torch.testing.assert_close(process["weights"]["weight"], expected, rtol=1e-4, atol=2e-6)
    assert torch.equal(*[process["weights"]["weight"] for process in found[1]["features"]])


@pytest.mark.slow
def test_parameters_that_the_loss_does_not_reach(found):
    """FDDTrainer tells DistributedDataParallel of them; in a hand-written loop an error does,
    before torch would hang.
    """
    for result in found[1]["partial"]:
        assert result["steps"] == {False: 3, True: 3}
        assert "10 parameters that train" in result["refused"]
        assert "find_unused_parameters=True" in result["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampling", "answering"])
def test_the_mean_is_over_what_all_processes_generated(found, kind):
    """Two micro-batches in each, of unlike lengths; in evaluation three rows, and one again."""
    pytest.importorskip("trl", minversion="1.10")
    from tests.support.on_policy import (
        mean_terms,
        require_plain_loop,
        student_model,
        teacher_model,
    )

    processes = [process[kind] for process in found[1]["generated"]]
    texts = [text for process in processes for text in process["texts"]]
    assert len(texts) == 8
    assert processes[0]["texts"] != processes[1]["texts"]
    for process in processes:
        require_plain_loop(texts, process["log"], process["gradient"])
    rows = processes[0]["evaluated"] + processes[1]["evaluated"][:1]
    assert len(rows) == 3
    assert len(processes[1]["evaluated"]) == 2
    with torch.no_grad():
        terms = mean_terms(rows, student_model(), teacher_model())
    for name, expected in terms.items():
        for process in processes:
            found_term = process["metrics"][f"eval_{name}"]
            assert found_term == pytest.approx(float(expected), rel=1e-6), name
