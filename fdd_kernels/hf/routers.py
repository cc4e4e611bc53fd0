"""The auxiliary loss of a mixture of experts, which keeps its routers in balance: as the model
itself computes it.

transformers' models add it to the loss of their own forward if `config.output_router_logits` is
set, with the coefficient `config.router_aux_loss_coef`. Only the backbone runs here, so its part
after the backbone is run on what the backbone gave.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.positions import attended_positions
from fdd_kernels.hf.wrappers import forward_replaced

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_coefficient(model: nn.Module) -> float:
    """What a model's router loss is weighted by in its own loss; 0 if it has none or it is not
    asked for.

    Raises:
        ValueError: it is asked for, and there is no coefficient.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    found = [
        getattr(where, name)
        for where in (config, model)
        for name in _COEFFICIENTS
        if hasattr(where, name)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has config.output_router_logits=True and no coefficient for "
            "their loss (looked for "
            f"{' and '.join(_COEFFICIENTS)}): set config.router_aux_loss_coef, or "
            "output_router_logits=False to leave it out"
        )
    return float(found[0])


class RouterLoss:
    """`with RouterLoss(lens) as router:` run the backbone; then `router(batch)` is its router loss,
    a scalar.
    """

    def __init__(self, lens: ModelReader) -> None:
        self.lens, self._output = lens, None

    def __enter__(self) -> RouterLoss:
        """Raises ValueError for a model that is run as a whole (see `ModelReader`): nothing of its
        own forward is left over.
        """
        if self.lens.backbone is self.lens.model:
            raise ValueError(
                f"the router loss of {type(self.lens.model).__name__} cannot be computed apart "
                "from its logits: set "
                "config.output_router_logits=False to leave it out"
            )
        self._hook = self.lens.backbone.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_error) -> None:
        self._hook.remove()

    def _keep(self, _module, _args, output) -> None:
        self._output = output

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Raises ValueError if the model gives no routers' logits, or makes no loss of them."""
        output, self._output = self._output, None
        if getattr(output, "router_logits", None) is None:
            raise self._missing("its backbone gives no router_logits")
        model, mask = (
            self.lens.model,
            batch["attention_mask"] if attended_positions(batch) is not None else None,
        )
        tokens = {
            name: batch[name]
            for name in ("input_ids", "inputs_embeds")
            if batch.get(name) is not None
        }
        # Its own forward, with the backbone's output in the place of the backbone and of logits
        # what costs nothing.
        with (
            forward_replaced(self.lens.backbone, lambda *_args, **_kwargs: output),
            forward_replaced(self.lens.head, lambda state: state[..., :1]),
        ):
            answer = type(model).forward(
                model, **tokens, attention_mask=mask, output_router_logits=True, use_cache=False
            )
        loss = getattr(answer, "aux_loss", None)
        if not isinstance(loss, Tensor):
            raise self._missing("its forward gives no aux_loss")
        return loss

    def _missing(self, what: str) -> ValueError:
        return ValueError(
            f"{type(self.lens.model).__name__} has config.output_router_logits=True, but {what}: "
            "set "
            "output_router_logits=False to train without the loss of its routers"
        )
