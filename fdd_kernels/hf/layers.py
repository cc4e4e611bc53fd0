"""Choose the layers to compare: each model has its own grid."""

from __future__ import annotations

from collections.abc import Sequence

from fdd_kernels.objectives.fdd.options import FDDConfig


def layer_grid(
    depth: int, num_layers: int, grid: str, option: str = "num_layers"
) -> tuple[int, ...]:
    """Return `num_layers` 1-based layers of a model with `depth` blocks; layer k is the state after
    k blocks. `option` is the name of their number, for the error.

    "floor" is the paper's rule: Q, 2Q, ..., with Q = depth // (num_layers + 1). "linspace" takes
    num_layers + 2 evenly spaced points over 0..depth and rounds the inner ones.

    Raises:
        ValueError: the model is too shallow for so many distinct layers.
    """
    if grid == "floor":
        step = depth // (num_layers + 1)
        layers = tuple(step * rank for rank in range(1, num_layers + 1))
    else:
        layers = tuple(round(depth * rank / (num_layers + 1)) for rank in range(1, num_layers + 1))
    if len({0, *layers}) != num_layers + 1:
        raise ValueError(
            f"{option}={num_layers} with layer_grid={grid!r} needs a deeper model: one of depth "
            f"{depth} gives layers {list(layers)}; lower {option} or name student_layers and "
            "teacher_layers"
        )
    return layers


def require_layers(name: str, layers: Sequence[int], depth: int) -> None:
    """Check explicit layers against a model with `depth` blocks.

    Raises:
        ValueError: a layer does not exist or is out of order.
    """
    if list(layers) != sorted(set(layers)) or (layers and (layers[0] < 0 or layers[-1] > depth)):
        raise ValueError(
            f"{name}={list(layers)} must be increasing layers between 0 (embeddings) and {depth} "
            "(the model's depth)"
        )


def paired_layers(
    config: FDDConfig, student_depth: int, teacher_depth: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sampled layers of student and teacher, in depth order; as many of each unless the
    config says otherwise.

    Raises:
        ValueError: a model is too shallow for the grid, or an explicit layer does not exist or is
            out of order.
    """
    if config.student_layers is None:
        of_teacher = config.num_layers, config.layer_grid, "num_layers"
        if config.num_teacher_layers is not None:
            of_teacher = config.num_teacher_layers, config.layer_grid, "num_teacher_layers"
        return (
            layer_grid(student_depth, config.num_layers, config.layer_grid),
            layer_grid(teacher_depth, *of_teacher),
        )
    for name, layers, depth in (
        ("student_layers", config.student_layers, student_depth),
        ("teacher_layers", config.teacher_layers, teacher_depth),
    ):
        require_layers(name, layers, depth)
    return config.student_layers, config.teacher_layers
