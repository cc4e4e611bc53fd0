"""Running a backbone once for the states of chosen blocks, no further than asked for."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from fdd_kernels.models.offload import end_forward
from fdd_kernels.models.parallel import FSDPModule


class _Enough(Exception):
    """Raised in the place of the first block that is not needed, and caught where the backbone was called."""


def capture_states(
    backbone: nn.Module,
    blocks: nn.ModuleList,
    inputs: dict[str, Tensor],
    layers: tuple[int, ...],
    *,
    final: bool = True,
    read: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """The states (batch, sequence, width) after the given numbers of blocks (0: the embeddings), and the final state.

    Args:
        inputs: what the backbone is called with; what it does not take is left out, and so is `use_cache`: no cache is made.
        final: whether the final state is asked for. If not, it is None, and blocks after the last of `layers` do not run
            (unless FSDP shards the backbone, whose bookkeeping needs whole forwards).
        read: applied to each state as it is captured, so that the raw ones are freed one by one.
    """
    if not layers and not final:
        return {}, None
    parameters = inspect.signature(backbone.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    accepted = {k: v for k, v in inputs.items() if (takes_any or k in parameters) and k != "use_cache"}
    sharded = any(isinstance(module, FSDPModule) for module in backbone.modules())
    unneeded = blocks[max(layers)] if not (final or sharded) and max(layers) < len(blocks) else None

    state = None
    with _hooks(blocks, layers, unneeded, read) as captured:
        try:
            output = backbone(**accepted, use_cache=False)
            state = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        except _Enough:
            end_forward(backbone, unneeded)
    return captured, state if final else None


@contextlib.contextmanager
def _hooks(
    blocks: nn.ModuleList, layers: tuple[int, ...], unneeded: nn.Module | None, read: Callable[[Tensor], Tensor] | None
) -> Iterator[dict[int, Tensor]]:
    """Collects states by layer while the backbone runs, and stops it before the block `unneeded`."""
    captured: dict[int, Tensor] = {}

    def keep(layer: int, value) -> None:
        # Recomputation under gradient checkpointing runs the hooks again: the first state is the one in the graph.
        if layer not in captured:
            state = value[0] if isinstance(value, tuple) else value
            captured[layer] = state if read is None else read(state)

    def stop(_module, _args) -> None:
        raise _Enough

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            if layer == 0:
                hook = blocks[0].register_forward_pre_hook(
                    lambda _module, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                )
            else:
                hook = blocks[layer - 1].register_forward_hook(lambda _m, _a, out, layer=layer: keep(layer, out))
            hooks.enter_context(hook)
        if unneeded is not None:
            hooks.enter_context(unneeded.register_forward_pre_hook(stop))
        yield captured
