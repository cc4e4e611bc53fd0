"""Divergences as text that configurations and command lines can carry: "jsd:0.1"."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fdd_kernels.lens.divergences import ALMOST_ONE, DIVERGENCES, Parameter


class NamedDivergence(NamedTuple):
    """A name of the registry with values for all its parameters."""

    name: str
    parameters: tuple[float, ...] = ()

    def value(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Compute the elementwise value."""
        return DIVERGENCES[self.name].value(log_q, log_p, *self.parameters)


def parse_divergence(text: str) -> NamedDivergence:
    """Parse "name" or "name:parameter,parameter", such as "jsd" or "alpha_beta:0.2,0.7".

    Parameters that are not given have their defaults. Values that make it another entry
    (`same_as`) give that entry.

    Raises:
        ValueError: an unknown name, a number of parameters that is not its own, or values out of
            range; says what is legal.
    """
    name, colon, given = text.partition(":")
    if name not in DIVERGENCES:
        raise ValueError(f"{text!r} is not one of {', '.join(divergence_forms())}")
    entry = DIVERGENCES[name]
    parts = given.split(",") if colon else []
    if not colon:
        values = entry.defaults
    else:
        if len(parts) != len(entry.parameters):
            raise ValueError(
                f"{text!r} gives {len(parts)} parameter(s), and {name} takes "
                f"{len(entry.parameters)}: write {_form(name)}"
            )
        try:
            values = tuple([float(part) for part in parts])
        except ValueError:
            raise ValueError(
                f"{text!r} has a parameter that is no number: write {_form(name)}"
            ) from None
    for parameter, value in zip(entry.parameters, values):
        if not (parameter.low <= value <= parameter.high and math.isfinite(value)):
            raise ValueError(
                f"{text!r} has {parameter.name} {value:g}, which is not in {_range(parameter)}"
            )
    reason = entry.illegal and entry.illegal(*values)
    if reason:
        raise ValueError(f"{text!r}: {reason}")
    if values in entry.same_as:
        return NamedDivergence(entry.same_as[values])
    return NamedDivergence(name, values)


def divergence_forms() -> list[str]:
    """List the forms that `parse_divergence` takes, such as "jsd[:beta]"."""
    return [_form(name) for name in DIVERGENCES]


def _range(parameter: Parameter) -> str:
    """Write a parameter's range; the largest number below 1 stands for all below 1."""
    below = {math.inf: "inf)", ALMOST_ONE: "1)"}
    return f"[{parameter.low:g}, {below.get(parameter.high, f'{parameter.high:g}]')}"


def _form(name: str) -> str:
    names = ",".join([parameter.name for parameter in DIVERGENCES[name].parameters])
    return f"{name}[:{names}]" if names else name
