"""Run a backbone once for the states of chosen blocks, and no further than the last of them."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fdd_kernels.hf.offload import end_forward
from fdd_kernels.hf.tail import final_state, first_tensor
from fdd_kernels.hf.wrappers import FSDPModule


class _Enough(Exception):
    """Raised before the first module that is not needed, and caught by `capture_states`."""


def capture_states(
    backbone: nn.Module,
    blocks: nn.ModuleList,
    inputs: dict[str, Tensor],
    layers: tuple[int, ...],
    *,
    final: bool = True,
    read: Callable[[Tensor], Tensor] | None = None,
    head: nn.Module | None = None,
    result: Callable[[Any], Tensor] | None = None,
    always: bool = False,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Return the states (batch, sequence, width) of `layers` by number, and the final state.

    Args:
        inputs: arguments of the backbone; those that it does not take are dropped.
            `use_cache=False` is added.
        layers: numbers of blocks, 0 for the embeddings.
        final: False returns None for the final state, and does not run blocks after the last of
            `layers` (unless FSDP shards the backbone, which needs complete forwards).
        read: applied to each state when it is captured, which frees the raw state.
        head: the head of a `backbone` that is the whole model. Its input is the final state, and
            the forward ends there.
        result: of a `backbone` that is the whole model with its head, makes what is returned as the
            final state from the result of its forward.
        always: run up to the blocks at least, also if nothing of them is asked for.
    """
    if not (layers or final or always):
        return {}, None
    parameters = inspect.signature(backbone.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    accepted = {
        k: v for k, v in (inputs | {"use_cache": False}).items() if takes_any or k in parameters
    }
    sharded = any(isinstance(module, FSDPModule) for module in backbone.modules())
    # All later blocks, not the next one only: the model may skip that.
    unneeded = [] if final or sharded else range(max(layers, default=0), len(blocks))
    state = last = None

    def stop(module, args) -> None:
        nonlocal state, last
        state, last = args[0] if args else None, module
        if not sharded:
            raise _Enough

    with captured_states(blocks, layers, read) as captured, contextlib.ExitStack() as end:
        for index in unneeded:
            hook = _at_its_turn(blocks, index, stop)
            end.enter_context(blocks[index].register_forward_pre_hook(hook))
        if head is not None:  # before other hooks that change the head's input
            end.enter_context(head.register_forward_pre_hook(stop, prepend=True))
        try:
            # The whole model may be called from within its own forward (see `inside_forward`),
            # whose hooks have run.
            is_whole = head is not None or result is not None
            output = (backbone.forward if is_whole else backbone)(**accepted)
            if head is None:
                state = (result or final_state)(output)
        except _Enough:
            end_forward(backbone, last)
    return captured, state if final else None


@contextlib.contextmanager
def captured_states(
    blocks: nn.ModuleList,
    layers: tuple[int, ...],
    read: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Collect states by layer while their model runs in the `with` block."""
    captured: dict[int, Tensor] = {}

    def store(layer: int, value) -> None:
        # Recomputation under gradient checkpointing runs the hooks again; the first state is the
        # one in the graph.
        if layer not in captured:
            state = first_tensor(value)
            captured[layer] = state if read is None else read(state)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            if layer > 0:
                after = _at_its_turn(
                    blocks, layer - 1, lambda _m, _a, out, layer=layer: store(layer, out)
                )
                hooks.enter_context(blocks[layer - 1].register_forward_hook(after))
            # For the embeddings, and for a block that was skipped, as those of images in text.
            if layer < len(blocks):
                before = _at_its_turn(
                    blocks,
                    layer,
                    lambda _m, args, kwargs, layer=layer: store(layer, [*args, *kwargs.values()]),
                )
                hooks.enter_context(
                    blocks[layer].register_forward_pre_hook(before, with_kwargs=True)
                )
        yield captured


def _at_its_turn(blocks: nn.ModuleList, index: int, hook: Callable) -> Callable:
    """Return a hook of the block at `index` that does nothing at other calls than this one, where
    the block stands at several places.
    """
    modules, calls = list(blocks), itertools.count()
    turn = modules[:index].count(modules[index])
    return lambda *args: hook(*args) if next(calls) == turn else None


def require_gradient(name: str, blocks: nn.ModuleList, states: dict[int, Tensor]) -> None:
    """Raise RuntimeError if a state by layer has no gradient although blocks before it train."""
    detached = [
        layer
        for layer, state in states.items()
        if torch.is_grad_enabled()
        and not state.requires_grad
        and any(p.requires_grad for block in blocks[:layer] for p in block.parameters())
    ]
    if detached:
        raise RuntimeError(
            f"{name}: the states of layers {detached} carry no gradient although blocks before "
            "them train: something detaches them (no_grad inside the model, or reentrant gradient "
            'checkpointing: use gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
