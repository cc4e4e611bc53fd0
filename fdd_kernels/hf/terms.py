"""The terms of a `Distiller`."""

from __future__ import annotations

from torch import Tensor

from fdd_kernels.objectives.fdd.options import FDDLossTerms


class DistillerTerms(FDDLossTerms):
    """`FDDLossTerms` of a `Distiller`, with one more term for a student with experts.

    Attributes:
        router: the load balancing loss of a student with experts and
            `config.output_router_logits`, unweighted like the others; `loss` includes it with the
            model's own coefficient. Otherwise None.
        encoder: trajectory plus derivative of an encoder-decoder's encoder, with
            `config.encoder_weight`, unweighted like the others. Otherwise None.
    """

    router: Tensor | None = None
    encoder: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Return every term by its name, for logs; `router` and `encoder` only if there are."""
        more = {name: getattr(self, name) for name in ("router", "encoder")}
        return self._asdict() | {name: term for name, term in more.items() if term is not None}
