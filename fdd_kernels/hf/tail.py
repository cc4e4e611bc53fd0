"""Record what a model does between its last block and its head, and repeat it for any state.

One forward pass is recorded as a list of steps: calls of whole modules (norms, projections, the
transform of a head) and, between them, single torch functions (scales, activations, permutations).
A step knows which of its arguments come from the state; all others are constants. Steps are correct
for other tokens only if no constant depends on the tokens, so the caller must check the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_NORMS = (nn.functional.layer_norm, nn.functional.rms_norm, torch.layer_norm, torch.rms_norm)
_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")


@dataclass(frozen=True)
class Slot:
    """A placeholder for a tensor that is computed from the state."""

    number: int


class Step(NamedTuple):
    """One call. `results` has a slot for each leaf of its result, None if it is no tensor."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    results: tuple[Slot | None, ...]

    @property
    def is_norm(self) -> bool:
        """Whether the step counts as a norm and can be skipped: any module but a projection (peft's
        linear layers too), which changes the width.
        """
        if not isinstance(self.function, nn.Module):
            return self.function in _NORMS
        return not (isinstance(self.function, nn.Linear) or hasattr(self.function, "base_layer"))

    @property
    def in_place(self) -> bool:
        """Whether it changes its first argument."""
        name = getattr(self.function, "__name__", "")
        return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))

    @property
    def slots(self) -> list[Slot]:
        """The arguments that come from the state."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Slot)]


class Steps:
    """The steps from one tensor to another; without steps, the identity."""

    def __init__(
        self, steps: Iterable[Step] = (), source: Slot | None = None, target: Slot | None = None
    ) -> None:
        self.steps, self.source, self.target = tuple(steps), source, target

    def __call__(self, state: Tensor, *, norms: bool = True) -> Tensor:
        """Apply the steps to `state`; with `norms=False` skip the norms among them."""
        values = {self.source: state}
        for step in self.steps:
            if step.is_norm and not norms:
                values[step.results[0]] = values[step.slots[0]]
                continue
            args, kwargs = tree_map(
                lambda leaf: values[leaf] if isinstance(leaf, Slot) else leaf,
                (step.args, step.kwargs),
            )
            if step.in_place:  # on a copy: the caller may still need the state
                args = (args[0].clone(), *args[1:])
            result = step.function(*args, **kwargs)
            leaves = [args[0]] if step.in_place else tree_leaves(result)
            pairs = zip(step.results, leaves)
            values.update((slot, leaf) for slot, leaf in pairs if slot is not None)
        return values[self.target]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules among the steps."""
        return [step.function for step in self.steps if isinstance(step.function, nn.Module)]

    def __str__(self) -> str:
        functions = [step.function for step in self.steps]
        named = [type(f) if isinstance(f, nn.Module) else f for f in functions]
        return str([f.__name__ for f in named]) if named else "no norm"


class Recording(TorchFunctionMode):
    """Record a forward pass from the end of the first list of blocks to the head's input.

    Args:
        model: the module that runs within `with recording.watching():`.
        head: the module whose input ends the record.
        lists: the lists of modules that may be the model's blocks.
        backbone: the module whose output is recorded on the way, or None.

    Attributes:
        ended: for each list that ran, in the order of their ends, the slot of its last state.
        calls: for each list its blocks in the order in which they ran.
        output, head_input: the slots of the backbone's output and of the head's input; None if they
            do not come from a block's state.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        lists: list[nn.ModuleList],
        backbone: nn.Module | None,
    ) -> None:
        super().__init__()
        self._model, self._head, self._lists, self._backbone = model, head, lists, backbone
        self.ended: dict[nn.ModuleList, Slot] = {}
        self.calls: dict[nn.ModuleList, list[nn.Module]] = {blocks: [] for blocks in lists}
        self.output: Slot | None = None
        self.head_input: Slot | None = None
        self._steps: list[Step] = []
        self._known: dict[int, Slot] = {}
        self._alive: list[Tensor] = []  # referenced, so that no other tensor gets a known id
        self._within: Step | None = None
        self._on = contextlib.ExitStack()
        self._recording = self._over = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the forward pass that runs in the `with` block."""
        # Record the inside of modules around the head or blocks; any other module is one step.
        around = {module for module in self._model.modules() if self._is_around(module)}
        with contextlib.ExitStack() as hooks:
            for module in self._model.modules():
                if module not in around:
                    hooks.enter_context(
                        module.register_forward_pre_hook(self._before, with_kwargs=True)
                    )
                hooks.enter_context(module.register_forward_hook(self._after, with_kwargs=True))
            hooks.enter_context(
                self._head.register_forward_pre_hook(self._enter_head, prepend=True)
            )
            hooks.callback(self._on.close)
            yield

    def _is_around(self, module: nn.Module) -> bool:
        inside = set(module.modules())
        return self._head in inside or not inside.isdisjoint(self._lists)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = Step(function, *tree_map(self._as_slot, (args, kwargs)), ())
        result = function(*args, **kwargs)
        if self._within is None:
            first = next((a for a in args if isinstance(a, Tensor)), None)
            if id(first) in self._known and not call.in_place and _same(first, result):
                self._name(result, self._known[id(first)])
            else:
                self._note(call, args, result)
        return result

    def _before(self, module, args, kwargs):
        if self._recording and self._within is None:
            self._within = Step(module, *tree_map(self._as_slot, (args, kwargs)), ())

    def _after(self, module, args, _kwargs, result):
        if self._within is not None and self._within.function is module:
            call, self._within = self._within, None
            self._note(call, args, result)
        for blocks in self._lists:
            if module in set(blocks):
                self.calls[blocks].append(module)
            if module is blocks[-1] and not self._over:
                state = first_tensor(result)
                slot = self._known.get(id(state)) or self._name(state, self._new())
                self.ended.pop(blocks, None)  # so that lists stay in the order of their last end
                self.ended[blocks] = slot
                if not self._recording:
                    self._recording = True
                    self._on.enter_context(self)
        if module is self._backbone:
            self.output = self._known.get(id(final_state(result)))

    def _enter_head(self, _module, args):
        if self._recording and not self._over:
            self._over, self._recording = True, False
            self.head_input = self._known.get(id(args[0])) if args else None
            self._on.close()

    def _as_slot(self, leaf):
        return self._known.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

    def _new(self) -> Slot:
        return Slot(len(self._alive))

    def _name(self, tensor: Tensor, slot: Slot) -> Slot:
        self._known[id(tensor)] = slot
        self._alive.append(tensor)
        return slot

    def _note(self, step: Step, args: tuple, result) -> None:
        if step.slots:
            leaves = [args[0]] if step.in_place else tree_leaves(result)
            named = [
                self._name(leaf, self._new()) if isinstance(leaf, Tensor) else None
                for leaf in leaves
            ]
            if any(named):
                self._steps.append(step._replace(results=tuple(named)))

    def steps(self, source: Slot | None, target: Slot | None) -> Steps | None:
        """Return the steps from `source` to `target`; None if `target` depends on other states
        than `source`, or a slot is None.
        """
        if source is None or target is None:
            return None
        needed, chosen = {target} - {source}, []
        for step in reversed(self._steps):
            if not needed.isdisjoint(step.results):
                chosen.insert(0, step)
                needed.difference_update(step.results)
                needed.update(set(step.slots) - {source})
        return None if needed else Steps(chosen, source, target)


def _same(one: Tensor, other) -> bool:
    """Whether a function returned its argument: a view of all of it, a cast to its own dtype."""
    if type(one) not in (Tensor, nn.Parameter) or type(other) is not Tensor:
        return False
    alike = one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
    return alike and one.device == other.device and one.data_ptr() == other.data_ptr()


def first_tensor(value) -> Tensor:
    """Return a tensor, or the first one of several: the state in a block's arguments or result."""
    values = (value,) if isinstance(value, Tensor) else value
    return next(one for one in values if isinstance(one, Tensor))


def final_state(output) -> Tensor:
    """Return the final state in a backbone's result."""
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
