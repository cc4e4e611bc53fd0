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


KINDS = [
    ("ddp", 2),
    *[
        pytest.param(kind, world, marks=pytest.mark.slow)
        for kind, world in (
            ("ddp", 4),
            ("fsdp", 2),
            ("fsdp-tied", 2),
            ("fsdp-self", 2),
            ("zero2", 2),
            ("zero3", 2),
        )
    ],
]


@pytest.mark.parametrize(("kind", "world"), KINDS)
def test_gradients_equal_those_of_one_process(tmp_path, kind, world):
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    finish_well(start(WORKER, kind, world, tmp_path))
    student, teacher = models(kind)
    distiller = Distiller(student, teacher, CONFIG)
    parts = batches(world)
    items = sum(distiller.count_positions(batch) for batch in parts)
    loss = sum(distiller(batch, num_items_in_batch=items).loss for batch in parts)
    loss.backward()
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=0)
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert found["gradients"].keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found["gradients"][name],
            gradient,
            rtol=1e-4,
            atol=1e-6 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(tmp_path):
    (status, errors), (killed, _) = finish(start(WORKER, "killed", 2, tmp_path), seconds=120)
    assert killed == 9
    assert status not in (0, None)
    assert "Error" in errors
    assert not (tmp_path / "found.pt").exists()


@pytest.mark.slow
def test_a_head_that_is_spread_over_processes_is_refused(tmp_path):
    for status, errors in finish(start(WORKER, "sharded-head", 2, tmp_path)):
        assert status != 0
        assert "the teacher's head is a DTensor" in errors


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
