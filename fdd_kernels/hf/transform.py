"""A model's soft cap and logit scale: from its config, and as measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Replace a head's output: a small number shows the scale, a large one the soft cap, the rest check
# both.
PROBE = (2.0**-10, 6e4, 0.5, -3.0, 25.0, -200.0, 0.0)


@dataclass(frozen=True)
class LogitTransform:
    """A model's logits as a function of x = h W^T + b: `softcap * tanh(scale * x / softcap)`, or
    `scale * x` without soft cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


def configured_transform(config) -> LogitTransform:
    """Return soft cap and logit scale by the config fields in use; `measured_transform` checks."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def number(*names: str) -> float | None:
        for value in (getattr(config, name, None) for name in names):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
                return float(value)
        return None

    # Cohere, Falcon-H1, Granite
    scale = (number("logit_scale") or 1.0) * (number("lm_head_multiplier") or 1.0)
    scale /= number("logits_scaling") or 1.0
    return LogitTransform(
        scale, number("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    )


@contextlib.contextmanager
def probing(head: nn.Module) -> Iterator[list[Tensor]]:
    """Replace the head's output by the numbers of `PROBE`, repeated. Yields a list that gets the
    replacement of each call, float64.
    """
    numbers, seen = torch.tensor(PROBE, dtype=torch.float64), []

    def replace(_module, _args, output: Tensor) -> Tensor:
        repeated = numbers.repeat(output.numel() // len(numbers) + 1)[: output.numel()]
        seen.append(repeated.view(output.shape).to(output.device))
        return seen[-1].clone()

    with head.register_forward_hook(replace):
        yield seen


def measured_transform(
    configured: LogitTransform, probe: Tensor, logits: Tensor
) -> LogitTransform | None:
    """Return the scale and soft cap that turn `probe` into `logits`, both flat float64 beginning as
    `PROBE`; None if there are none. `configured` is preferred if it fits.
    """
    scale, largest = float(logits[0] / probe[0]), float(logits[1])
    is_capped = abs(largest - scale * PROBE[1]) > 1e-3 * abs(scale * PROBE[1])
    for transform in (configured, LogitTransform(scale, largest if is_capped else None)):
        if torch.allclose(transform(probe), logits, rtol=1e-5, atol=0):
            return transform
    return None
