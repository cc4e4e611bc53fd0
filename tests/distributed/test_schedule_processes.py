"""Options that change during training in two gloo processes, against one process."""

import pytest
import torch

from fdd_kernels import Distiller
from tests.distributed.schedule_worker import KINDS, batches, models, train
from tests.support.processes import finish_well, start

WORKER = "tests.distributed.schedule_worker"


def alone(config):
    """The same steps in one process. GradientBalance measures the first micro-batch: here it is
    made of the first ones of both processes.
    """
    student, teacher = models()
    distiller = Distiller(student, teacher, config)

    def items(step):
        return sum(distiller.count_positions(batch) for batch in batches(step, 4))

    def joined(step):
        parts = batches(step, 4)
        return [together(parts[:2]), together(parts[2:])]

    return train(distiller, student, joined, items), student


def together(parts: list[dict]) -> dict:
    """Micro-batches as one, padded on the right."""
    longest = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.cat(
            [
                torch.nn.functional.pad(part[key], (0, longest - part[key].shape[1]), value=value)
                for part in parts
            ]
        )
        for key, value in fill.items()
    }


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What both processes found, by kind."""
    folder = tmp_path_factory.mktemp("schedules")
    finish_well(start(WORKER, "all", 2, folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_agree_and_equal_one(processes, kind):
    first, second = (process[kind] for process in processes)
    assert first["logged"] == second["logged"]
    assert first["state"] == second["state"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    logged, student = alone(KINDS[kind])
    # Sums in float64 of at most 60 x 97 addends in another order, 2^-39, over four steps in a row.
    for found, expected in zip(first["logged"], logged, strict=True):
        assert found == pytest.approx(expected, rel=2**-36)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            first["weights"][name], parameter.detach(), rtol=2**-36, atol=2**-40, msg=name
        )
    if kind == "stage":
        # The head, and what comes after the last sampled layer, at the first stage.
        unreached, static = first["refused"]
        assert "parameters that train" in unreached
        assert "find_unused_parameters=True" in unreached
        assert "static_graph=True, but schedules or stages leave out other" in static
    else:
        assert first["refused"] == []
