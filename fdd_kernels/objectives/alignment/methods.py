"""The methods of `align_layers`, and the checks of a training that names one. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdd_kernels.objectives.option_checks import require_choice, require_int, require_number

if TYPE_CHECKING:
    from fdd_kernels.objectives.fdd.options import FDDConfig

METHODS = ("argmin", "monotone", "attention", "sinkhorn", "emd")
# Methods whose weights change smoothly with the costs: the default of epsilon, in standard
# deviations of the costs.
SMOOTH = {"attention": 1.0, "sinkhorn": 0.1}
# Methods whose columns have given sums too.
TRANSPORT = ("sinkhorn", "emd")
# Of a config: no alignment, layers are paired by their position.
RANK = "rank"


def compares_all_pairs(backend: str) -> bool:
    """Tell whether a backend can compare a student layer with several teacher layers."""
    from fdd_kernels.backends import BACKENDS
    from fdd_kernels.objectives.alignment.objective import cost_spec
    from fdd_kernels.objectives.alignment.options import CostOptions

    spec = cost_spec(CostOptions(), columns=1, students=1, teachers=2)
    return backend not in BACKENDS or BACKENDS[backend].refusal(spec) is None


def check_alignment(config: FDDConfig) -> None:
    """Check the options of a config that say how layers are paired from data.

    Raises:
        TypeError, ValueError: naming the option, its value and the remedy.
    """
    method, defaults = config.layer_alignment, type(config)
    require_choice("layer_alignment", method, (RANK, *METHODS))
    require_int("alignment_every", config.alignment_every, minimum=1)
    require_number("alignment_epsilon", config.alignment_epsilon, positive=True, optional=True)
    if config.alignment_epsilon is not None and method not in SMOOTH:
        raise ValueError(
            f"alignment_epsilon={config.alignment_epsilon} has no effect on "
            f"layer_alignment={method!r}: leave it at None, or use "
            'layer_alignment="attention" or "sinkhorn"'
        )
    if method == RANK:
        if config.alignment_every != defaults.alignment_every:
            raise ValueError(
                f"alignment_every={config.alignment_every} has no effect on "
                f'layer_alignment="rank": leave it at {defaults.alignment_every}, or name another '
                "alignment"
            )
        return
    if config.pairs_all_layers or config.derivative_layers is not None:
        name = "layer_weights" if config.pairs_all_layers else "derivative_layers"
        raise ValueError(
            f"{name}={getattr(config, name)} names the pairs of layers, which "
            f"layer_alignment={method!r} finds: give one of the two"
        )
    if config.dynamics_layers == config.output_in_dynamics:
        raise ValueError(
            f"layer_alignment={method!r} pairs sampled layers, and there are none "
            f"(num_layers={config.num_layers}): sample some, or use "
            'layer_alignment="rank"'
        )
    if not (config.ever("alpha") or config.ever("beta")):
        raise ValueError(
            f"layer_alignment={method!r} pairs the layers of trajectory and derivative, but "
            "alpha=0 and beta=0 leave both out: give one of them a weight, or use "
            'layer_alignment="rank"'
        )
    _check_backend(config)


def _check_backend(config: FDDConfig) -> None:
    """Refuse a backend that cannot compute the pairs which the method may choose."""
    method = config.layer_alignment
    has_derivative = bool(config.ever("beta")) and config.derivative is not None
    one_pair = method == "monotone" or (method == "argmin" and not has_derivative)
    if one_pair or compares_all_pairs(config.backend):
        return
    raise ValueError(
        f"layer_alignment={method!r} may compare a student layer with several teacher layers, "
        f"which backend={config.backend!r} cannot: use "
        'layer_alignment="monotone", or backend="auto"'
    )
