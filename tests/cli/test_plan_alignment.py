"""Memory prediction of a training that pairs layers from its data, and `plan`'s options for it."""

import json

import pytest
import torch

from fdd_kernels import fused_fdd_loss, layer_costs
from fdd_kernels.backends import why_unavailable
from fdd_kernels.cli.main import main
from fdd_kernels.memory.alignment import costs_memory, planned_pairs
from fdd_kernels.memory.loss import MIB, LossMemory, LossShape, loss_memory
from fdd_kernels.objectives.alignment.methods import METHODS
from fdd_kernels.objectives.fdd.options import LossOptions
from tests.support.allocations import allocated_peak

ROWS, COLUMNS, WIDTHS = 96, 12000, (64, 32)


class Call:
    """Hidden states of sampled layers and outputs, and heads, of a dtype."""

    def __init__(self, students: int, teachers: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        depths = students + 1, teachers + 1
        self.student, self.teacher = (
            [normal(ROWS, width) for _ in range(depth)] for depth, width in zip(depths, WIDTHS)
        )
        self.heads = [0.3 * normal(COLUMNS, width) for width in WIDTHS]
        self.leaves = [tensor.requires_grad_() for tensor in (*self.student, self.heads[0])]
        self.shape = LossShape(
            ROWS,
            COLUMNS,
            *WIDTHS,
            layers=depths[0],
            teacher_layers=depths[1],
            itemsize=dtype.itemsize,
        )


def agree(measured: int, prediction: LossMemory, least: float) -> None:
    predicted = prediction.total - prediction.parts["runtime"]
    assert least * predicted <= measured <= 1.01 * predicted, (
        f"predicted {predicted / MIB:.2f} MiB, allocated {measured / MIB:.2f} MiB"
    )


SIZES = [
    ("torch", 3, 5, torch.float32),
    ("torch", 4, 2, torch.bfloat16),
    ("cpu", 3, 5, torch.float32),
    ("cpu", 4, 2, torch.bfloat16),
]


@pytest.mark.parametrize(("provider", "students", "teachers", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize("method", ["monotone", "argmin", "attention"])
def test_the_loss_of_pairs(provider, students, teachers, dtype, method):
    if why_unavailable(provider, torch.device("cpu")):
        pytest.skip(f"no backend {provider}")
    call = Call(students, teachers, dtype)
    options = planned_pairs(LossOptions(), method, students, teachers)

    def step():
        loss = fused_fdd_loss(
            call.student,
            call.heads[0],
            call.teacher,
            call.heads[1],
            layer_weights=options.layer_weights,
            derivative_layers=options.derivative_layers,
            backend=provider,
        )
        return torch.autograd.grad(loss, call.leaves)

    shape = LossShape(**vars(call.shape) | {"options": options})
    # The C++ kernels take the scratch of their threads from the system.
    agree(allocated_peak(step), loss_memory(shape, provider), 0.9 if provider == "cpu" else 0.99)


@pytest.mark.parametrize(("provider", "students", "teachers", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize("cost", ["kl", "jsd:0.1", "skew_kl", "alpha_beta", "tv", "mse", "cosine"])
def test_the_costs_of_all_pairs(provider, students, teachers, dtype, cost):
    if why_unavailable(provider, torch.device("cpu")):
        pytest.skip(f"no backend {provider}")
    call = Call(students, teachers, dtype)

    @torch.no_grad()
    def costs():
        hidden = call.student[:-1], call.heads[0], call.teacher[:-1], call.heads[1]
        mask = torch.ones(ROWS, dtype=torch.bool)
        return layer_costs(*hidden, mask=mask, cost=cost, backend=provider)

    pairs = planned_pairs(LossOptions(trajectory=cost), "attention", students, teachers)
    prediction = costs_memory(LossShape(**vars(call.shape) | {"options": pairs}), provider)
    measured = allocated_peak(costs)
    if provider == "torch":
        agree(measured, prediction, 0.99)
    else:  # the kernels take all but statistics from the system
        assert measured >= prediction.parts["statistics"]
        assert measured <= prediction.total - prediction.parts["runtime"]


def test_pairs_of_the_most_memory():
    found = planned_pairs(LossOptions(output_in_dynamics=True), "attention", 2, 3)
    assert found.layer_weights == ((1, 1, 1, 0), (1, 1, 1, 0), (0, 0, 0, 1))
    assert found.derivative_layers == (0, 2, 3)
    found = planned_pairs(LossOptions(), "monotone", 2, 3)
    assert found.layer_weights == ((1, 0, 0), (0, 0, 1))
    found = planned_pairs(LossOptions(), "argmin", 2, 3)
    assert found.layer_weights == ((0, 0, 1), (1, 0, 0))


def plan(capsys, *more, device="cpu"):
    arguments = ["--student", "768x12x50257", "--teacher", "1600x48x50257", "--tokens", "8192"]
    assert main(["plan", *arguments, "--device", device, "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    return found["setup"], found["fused"]


@pytest.mark.parametrize("method", METHODS)
def test_the_command_counts_an_alignment(capsys, method):
    setup, parts = plan(capsys, "--backend", "torch")
    assert setup["alignment"] == "rank"
    more = ["--layer-alignment", method, "--num-teacher-layers", "8"]
    aligned, found = plan(capsys, "--backend", "torch", *more)
    assert (aligned["alignment"], aligned["layers"], aligned["teacher_layers"]) == (method, 4, 8)
    states = 8192 * 1600 * 2
    assert found["teacher states"] - parts["teacher states"] == 4 * states
    if method not in ("monotone", "argmin"):
        assert found["loss"] > parts["loss"]


def test_auto_passes_over_a_backend_that_cannot(capsys):
    """Then the loss takes what the torch backend does; the costs do in any case."""
    on_gpu = {"device": "cuda"}
    for method, backend in (("attention", "torch"), ("monotone", "triton")):
        options = ["--layer-alignment", method]
        found = plan(capsys, *options, **on_gpu)[1]
        assert found["loss"] == plan(capsys, *options, "--backend", backend, **on_gpu)[1]["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer-alignment", "near"], "--layer-alignment near is not one of 'rank', 'argmin'"),
        (
            ["--layer-alignment", "emd", "--backend", "triton"],
            "which --backend triton cannot: use --layer-alignment monotone, or --backend auto",
        ),
        (["--num-teacher-layers", "8"], "--num-layers 4 and --num-teacher-layers 8 are unequal"),
        (
            ["--layer-alignment", "emd", "--num-teacher-layers", "50"],
            "--num-teacher-layers 50, --teacher with 48 blocks",
        ),
        (
            ["--layer-weights", ";".join(["1,1,1,1"] * 4), "--backend", "triton"],
            "cannot compute this: student layer 0 with teacher layers 0 and 1",
        ),
        (
            ["--layer-weights", ";".join(["1,1"] * 4), "--layer-alignment", "emd"],
            "names the pairs of layers, which --layer-alignment emd finds: give one of the two",
        ),
    ],
)
def test_options_that_do_not_go_together(capsys, arguments, message):
    models = ["--student", "768x12x50257", "--teacher", "1600x48x50257", "--tokens", "64"]
    assert main(["plan", *models, *arguments]) == 2
    assert message in capsys.readouterr().err
