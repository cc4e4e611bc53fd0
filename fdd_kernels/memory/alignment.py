"""Predict the memory of a training that pairs layers from its data: of its losses, and of the costs
of all pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fdd_kernels.memory.loss import FLOAT, LossMemory, LossShape, input_bytes

if TYPE_CHECKING:  # the options of the command line need no torch
    from fdd_kernels.objectives.fdd.options import LossOptions
# Numbers per row and pair while a cost is made of its statistics: of a divergence, of a distance.
VALUE_NUMBERS, DISTANCE_NUMBERS = 1, 12


def planned_pairs(options: LossOptions, method: str, students: int, teachers: int) -> LossOptions:
    """Return the options with a pairing of about the most memory that a method may find.

    Of "argmin" a pairing with up to 1.3% more was seen.

    Args:
        method: of `align_layers`.
        students, teachers: numbers of sampled layers.
    """
    spread = [round(i * (teachers - 1) / max(students - 1, 1)) for i in range(students)]
    # In the other order the derivative compares other pairs than the trajectory.
    one_each = {"monotone": spread, "argmin": spread[::-1]}.get(method)
    output = options.output_in_dynamics
    rows = [
        [float(one_each is None or one_each[i] == j) for j in range(teachers)] + [0.0] * output
        for i in range(students)
    ]
    rows += [[0.0] * teachers + [1.0]] * output
    return replace(options, layer_weights=rows, derivative_layers=spread + [teachers] * output)


def costs_memory(
    shape: LossShape,
    provider: str,
    *,
    threads: int = 1,
    device: str = "cpu",
    device_memory: int | None = None,
) -> LossMemory:
    """Predict the memory of the costs of all pairs of layers, which need no gradient.

    Args:
        shape: of the loss; its last states are not compared.
        provider, threads, device, device_memory: as of `loss_memory`. "torch" takes the place of a
            backend that does not compare all pairs.
    """
    from fdd_kernels.backends import BACKENDS
    from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS
    from fdd_kernels.objectives.alignment.methods import compares_all_pairs
    from fdd_kernels.objectives.alignment.objective import cost_spec
    from fdd_kernels.objectives.alignment.options import CostOptions
    from fdd_kernels.objectives.fdd.options import LossOptions

    options = shape.options or LossOptions()
    students, teachers = (states - 1 for states in shape.depths)
    wanted = CostOptions(cost=options.trajectory, temperature=options.temperature)
    spec = cost_spec(wanted, shape.columns, students, teachers)
    call = replace(
        shape.call(threads, device, device_memory),
        layers=students,
        teacher_layers=teachers,
        train_head=False,
        backward=False,
        spec=spec,
    )
    backend = provider if compares_all_pairs(provider) else "torch"
    numbers = 2 * max(students, teachers)
    numbers += (REQUEST_STATS + VALUE_NUMBERS) * len(spec.requests)
    numbers += (MOMENT_STATS + DISTANCE_NUMBERS) * len(spec.moments)
    parts = BACKENDS[backend].memory(call) | {"statistics": FLOAT * shape.rows * numbers}
    return LossMemory(parts, input_bytes(shape))
