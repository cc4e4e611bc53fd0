"""Gradients of data-parallel students in gloo processes against one process; killed processes."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fdd_kernels import Distiller
from tests.distributed.parallel_worker import CONFIG, batches, models
from tests.support.hf_models import tiny_model
from tests.support.processes import finish, finish_well, start

WORKER = "tests.distributed.parallel_worker"


# One start of processes for these, one after the other: they import for longer than they compute.
# The last one ends the processes.
TOGETHER = ("ddp", "fsdp", "fsdp-tied", "fsdp-self", "sharded-head", "killed")
KINDS = [
    *[(kind, 2) for kind in TOGETHER[:-2]],
    *[
        pytest.param(kind, world, marks=pytest.mark.slow)
        for kind, world in (("ddp", 4), ("zero2", 2), ("zero3", 2))
    ],
]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of the results of TOGETHER, and how each process ended."""
    folder = tmp_path_factory.mktemp("together")
    return folder, finish(start(WORKER, ",".join(TOGETHER), 2, folder))


def results(folder, kind: str, world: int) -> list[dict]:
    return [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize(("kind", "world"), KINDS)
def test_gradients_equal_those_of_one_process(request, tmp_path, kind, world):
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if world == 2 and kind in TOGETHER:
        folder, ends = request.getfixturevalue("together")
        assert (folder / f"{kind}-0.pt").exists(), ends
    else:
        folder = tmp_path
        finish_well(start(WORKER, kind, world, folder))
    found, *others = results(folder, kind, world)
    assert not [result["error"] for result in (found, *others) if "error" in result]
    student, teacher = models(kind)
    distiller = Distiller(student, teacher, CONFIG)
    parts = batches(world)
    items = sum(distiller.count_positions(batch) for batch in parts)
    loss = sum(distiller(batch, num_items_in_batch=items).loss for batch in parts)
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for result in (found, *others):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=0)
        assert result["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                result["gradients"][name],
                gradient,
                rtol=1e-4,
                atol=1e-6 * scale,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_a_process_that_is_killed_ends_the_others(together):
    folder, ((status, _), (killed, _)) = together
    assert killed == 9
    assert status not in (0, None)
    assert not (folder / "killed-1.pt").exists()
    found = torch.load(folder / "killed-0.pt", weights_only=True)
    assert "Error" in found["error"]


def test_a_head_that_is_spread_over_processes_is_refused(together):
    for found in results(together[0], "sharded-head", 2):
        assert "the teacher's head is a DTensor" in found["error"]


def test_fsdp1_is_refused():
    model = tiny_model("llama", depth=3)
    # its constructor wants an accelerator
    flattened = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flattened)
    flattened._fsdp_wrapped_module = model
    with pytest.raises(TypeError, match=r"FSDP1.*fully_shard"):
        Distiller(flattened, model)
    distiller = Distiller(model, model, CONFIG)
    with pytest.raises(TypeError, match=r"FSDP1.*fully_shard"):
        distiller(batches(1)[0], student=flattened)


def test_a_head_that_zero3_has_partitioned_is_refused():
    """Imitate DeepSpeed's marks on such a parameter: `ds_id`, and no elements."""
    student, teacher = models("ddp")
    distiller = Distiller(student, teacher, CONFIG)
    weight = student.lm_head.weight
    weight.ds_id, whole = 7, weight.data
    distiller(batches(1)[0])  # gathered
    weight.data = torch.empty(0)
    for use in (lambda: distiller(batches(1)[0]), lambda: Distiller(student, teacher, CONFIG)):
        with pytest.raises(RuntimeError, match=r"student.*ZeRO-3.*GatheredParameters"):
            use()
    weight.data = whole
