"""The checks of an `FDDConfig` that look at several of its options. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdd_kernels.objectives.alignment.methods import RANK, check_alignment
from fdd_kernels.objectives.option_checks import require_choice, require_int, require_number

if TYPE_CHECKING:
    from fdd_kernels.objectives.fdd.options import FDDConfig

SPACES = ("lens", "feature")
PROJECTIONS = ("auto", "linear")
ROWS = ("states", "deviation")
POOLINGS = ("mean", "cls")
# Of the logits that feature space does not have.
_OF_LOGITS = ("temperature", "derivative_temperature")


def check_pairs(config: FDDConfig) -> None:
    """Check which layers of student and teacher are compared.

    Raises:
        TypeError, ValueError: naming the option, its value and the remedy.
    """
    if (config.student_layers is None) != (config.teacher_layers is None):
        raise ValueError(
            "student_layers and teacher_layers must be given together: they are compared"
        )
    if config.num_teacher_layers is not None:
        require_int("num_teacher_layers", config.num_teacher_layers, minimum=1)
        if config.teacher_layers is not None:
            raise ValueError(
                f"num_teacher_layers={config.num_teacher_layers} samples layers, but "
                f"teacher_layers={config.teacher_layers} names them: give one of the two"
            )
    check_alignment(config)
    counts = config.dynamics_layers, config.teacher_dynamics_layers
    if config.layer_alignment != RANK:
        counts = counts[0], counts[0]  # for the length of `layer_weights`
    elif counts[0] != counts[1] and not config.pairs_all_layers:
        names = "student_layers", "teacher_layers"
        if config.student_layers is None:
            names = "num_layers", "num_teacher_layers"
        given = " and ".join(f"{name}={getattr(config, name)}" for name in names)
        raise ValueError(
            f"{given} are unequal numbers of layers, which are paired by rank: give as many of "
            "each, a layer_alignment, or layer_weights with a row for each layer of the "
            "student and a column for each of the teacher"
        )
    config.layer_pairs(*counts)


def check_encoder(config: FDDConfig) -> None:
    """Check the options of encoders; raise TypeError or ValueError naming option and remedy."""
    from fdd_kernels.lens.divergences import FEATURE_DISTANCES

    require_number("encoder_weight", config.encoder_weight)
    require_choice("encoder_trajectory", config.encoder_trajectory, FEATURE_DISTANCES)
    if config.encoder_weight and not config.num_layers:
        raise ValueError(
            f"encoder_weight={config.encoder_weight:g} needs sampled layers, but num_layers=0: "
            "give num_layers=1 or more"
        )
    others = ("alpha", "beta", "output_kd_weight", "ce_weight")
    if config.encoder_weight and not any(config.ever(name) for name in others):
        raise ValueError(
            f"encoder_weight={config.encoder_weight:g} adds to the loss of the decoder, but "
            f"{', '.join(others)} are 0: give one of them a weight"
        )


def check_space(config: FDDConfig) -> None:
    """Check the options of the space in which trajectory and derivative compare.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    require_choice("space", config.space, SPACES)
    require_choice("projection", config.projection, PROJECTIONS)
    require_choice("rows", config.rows, ROWS)
    require_choice("pooling", config.pooling, POOLINGS)
    if config.space == "lens":
        for name in ("projection", "rows"):
            value, default = getattr(config, name), getattr(type(config), name)
            if value != default and not config.encoder_weight:
                raise ValueError(
                    f'{name}={value!r} is an option of feature space, but space="lens": give '
                    f'space="feature", or leave {name}={default!r}'
                )
        return
    from fdd_kernels.lens.distances import DISTANCES

    compares_layers = config.ever("alpha") or config.layer_alignment != RANK
    if compares_layers and config.trajectory not in DISTANCES:
        raise ValueError(
            f'trajectory={config.trajectory!r} compares distributions, but space="feature" '
            'compares states: give trajectory="mse" or "cosine", or space="lens"'
        )
    derivative = config.derivative if config.ever("beta") else None
    if derivative is not None and DISTANCES[derivative].weighted:
        raise ValueError(
            f"derivative={derivative!r} weighs tokens by the teacher's probabilities, which "
            'space="feature" does not have: give another derivative ("auto" is "cosine" there), '
            'or space="lens"'
        )
    for name in _OF_LOGITS:
        for values in config.values_at_turns():
            value = values.get(name, getattr(config, name))
            if value not in (None, 1):
                raise ValueError(
                    f"{name}={value:g} divides the logits of trajectory and derivative, which "
                    'space="feature" does not have: leave it out, or give space="lens"'
                )
