"""A teacher that shares its student's modules: one peft model, with and without its adapters.

Each pass sets the modules to what it needs (evaluation mode, adapters off) and restores them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn

from fdd_kernels.hf.wrappers import evaluating, unwrap


def shares_modules(teacher: nn.Module, student: nn.Module) -> bool:
    """Whether a teacher and its student have modules in common.

    Raises:
        ValueError: the teacher is another peft model around the student's base model, whose layers
            hold the adapters of both.

    Warns:
        UserWarning: parameters that train belong to both, so the teacher changes with its student.
    """
    if not set(student.modules()) & set(teacher.modules()):
        return False
    layers, wrapper = _shared_adapters(teacher, student), _peft_model(teacher)
    if layers and wrapper is not None and wrapper is not _peft_model(student):
        raise ValueError(
            f"the teacher is a {type(wrapper).__name__} around a base model that the student "
            "shares: peft puts the adapters of both into the same layers, and neither could be run "
            "without the other's. Load the base model twice; or, if the teacher is the student "
            "without its adapters, pass the student's own peft model as the teacher"
        )
    own = {id(p) for layer in layers for p in _adapters_of(layer)}
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    common = [name for name, p in unwrap(teacher).named_parameters() if id(p) in trained - own]
    if common:
        warnings.warn(
            f"{len(common)} parameters that train, {common[0]} for one, belong to student and "
            "teacher: the teacher changes with its student (and if they are one model without "
            "adapters, there is nothing to learn from it). Give the teacher weights of its own "
            "(copy.deepcopy), or freeze what they share and train adapters (peft)",
            stacklevel=5,
        )
    return True


@contextlib.contextmanager
def as_teacher_of_itself(model: nn.Module, student: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and without the student's adapters; restore every module
    afterwards.

    peft's own `enable_adapters` would also change `requires_grad` of adapters, which FSDP2 records
    at its first forward.
    """
    layers = [layer for layer in _shared_adapters(model, student) if not layer.disable_adapters]
    with evaluating(model):
        try:
            for layer in layers:
                layer._disable_adapters = True
                if not layer.disable_adapters:
                    raise RuntimeError(
                        "this version of peft gives no way to switch the adapters of "
                        f"{type(layer).__name__} off"
                    )
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False


def _peft_model(model: nn.Module) -> nn.Module | None:
    """Return the peft model inside torch.compile and DistributedDataParallel, or None."""
    while not hasattr(model, "get_base_model"):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return None
    return model


def _shared_adapters(teacher: nn.Module, student: nn.Module) -> list[nn.Module]:
    """Return peft's layers in both models. In a layer `disable_adapters` is a property; in a model
    it is a method.
    """
    both = set(student.modules())
    return [
        module
        for module in teacher.modules()
        if module in both and isinstance(getattr(type(module), "disable_adapters", None), property)
    ]


def _adapters_of(layer: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a layer without those of the layer that it adapts."""
    names = ("base_layer.", "original_module.")
    return [parameter for name, parameter in layer.named_parameters() if not name.startswith(names)]
