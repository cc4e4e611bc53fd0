"""The load balancing loss of a mixture of experts, as the model itself computes it.

transformers' models add it to the loss of their own forward if `config.output_router_logits` is
set, with the coefficient `config.router_aux_loss_coef`. Here only the backbone has run, so the
model's forward runs once more with the backbone replaced by its output.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.positions import attended_positions
from fdd_kernels.hf.wrappers import forward_replaced

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_coefficient(model: nn.Module) -> float:
    """Return the weight of the router loss in a model's own loss; 0 if `output_router_logits` is
    not set.

    Raises:
        ValueError: it is set, and there is no coefficient.
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
            f"their loss (looked for {' and '.join(_COEFFICIENTS)}): set "
            "config.router_aux_loss_coef, or output_router_logits=False to leave it out"
        )
    return float(found[0])


class RouterLoss:
    """`with RouterLoss(reader) as router:` run the backbone; then `router(batch)` is its router
    loss, a scalar.
    """

    def __init__(self, reader: ModelReader) -> None:
        self.reader, self._output = reader, None

    def __enter__(self) -> RouterLoss:
        """Raise ValueError for a model that runs as a whole (see `ModelReader`): it has no part of
        its forward after the backbone.
        """
        if self.reader.backbone is self.reader.model:
            raise ValueError(
                f"the router loss of {type(self.reader.model).__name__} cannot be computed apart "
                "from its logits: set config.output_router_logits=False to leave it out"
            )
        self._hook = self.reader.backbone.register_forward_hook(self._store)
        return self

    def __exit__(self, *_error) -> None:
        self._hook.remove()

    def _store(self, _module, _args, output) -> None:
        self._output = output

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Raise ValueError if there are no router logits, or the model makes no loss of them."""
        output, self._output = self._output, None
        if getattr(output, "router_logits", None) is None:
            raise self._missing("its backbone gives no router_logits")
        model = self.reader.model
        mask = batch["attention_mask"] if attended_positions(batch) is not None else None
        names = ("input_ids", "inputs_embeds")
        tokens = {name: batch[name] for name in names if batch.get(name) is not None}
        # Replace the backbone by its output, and the head by a function that costs nothing.
        with (
            forward_replaced(self.reader.backbone, lambda *_args, **_kwargs: output),
            forward_replaced(self.reader.head, lambda state: state[..., :1]),
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
            f"{type(self.reader.model).__name__} has config.output_router_logits=True, but {what}: "
            "set output_router_logits=False to train without the loss of its routers"
        )
