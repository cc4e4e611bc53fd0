"""Validation of a call and the frozen plan that the rest of the package carries out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fdd_kernels.backends import resolve_backend
from fdd_kernels.backends.triton.launch import is_recording
from fdd_kernels.lens.divergences import DIVERGENCES, FEATURE_DISTANCES
from fdd_kernels.lens.spec import NLL, Layers, LensSpec, PairMoments, Request
from fdd_kernels.objectives.fdd.options import LossOptions

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEBUG_SWITCH = "FDD_KERNELS_DEBUG"


@dataclass(frozen=True)
class Plan:
    """What one call computes and where each term is found among the statistics.

    `layers` are the positions, among the hidden states given, of those that are read; `spec` counts
    within them. A term is a position, or one per layer or pair, among `spec.reads` or
    `spec.moments`; None or empty: not computed.
    """

    options: LossOptions
    backend: str
    feature_space: bool
    leading_shape: tuple[int, ...]
    layers: tuple[int, ...]
    spec: LensSpec
    output_kd: int | None
    ce: int | None
    trajectory: tuple[int, ...]
    derivative: tuple[int, ...]
    # For each pair, the requests with the log-sum-exps of its layers; empty where the deltas need
    # none.
    derivative_requests: tuple[tuple[int, int], ...]


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor, for error messages."""
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)} on "
        f"{tensor.device}"
    )


def _as_states(name: str, states) -> tuple[Tensor, ...]:
    if isinstance(states, Tensor):
        states = (states,)
    if not isinstance(states, Sequence):
        raise TypeError(
            f"{name} must be a tensor or a sequence of tensors, got {type(states).__name__}"
        )
    if not len(states):
        raise ValueError(f"{name} is empty: pass at least the final hidden state")
    for index, state in enumerate(states):
        _require_float(f"{name}[{index}]", state)
        if state.ndim < 1 or state.shape != states[0].shape:
            raise ValueError(
                f"{name}[{index}] has shape {tuple(state.shape)}, {name}[0] has "
                f"{tuple(states[0].shape)}: all layers of a "
                "model must have one shape (..., width)"
            )
    if states[0].shape[-1] == 0:
        raise ValueError(f"{name} has width 0: shape {tuple(states[0].shape)}")
    return tuple(states)


def _require_float(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} is a {describe(tensor)}: pass float32, bfloat16, float16 or float64 "
            "(dequantise it first)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}: pass a dense tensor (.to_dense())")
    _require_plain(name, tensor)


def _require_plain(name: str, tensor: Tensor) -> None:
    """Refuse a DTensor, which stands for the tensors of several processes."""
    if torch.compiler.is_compiling():
        return
    if hasattr(tensor, "placements"):  # a DTensor, whose module takes long to import
        raise TypeError(
            f"{name} is a DTensor with placements {tensor.placements}: pass all of it "
            "(.full_tensor()), or, of heads that are "
            "split over their rows, this process's rows (.to_local()) together with vocab_group"
        )


def _check_transforms(named: dict[str, Tensor | None], backend: str) -> None:
    """Refuse what differentiates or batches the loss in another way than backward passes do; the
    reference can.
    """
    if backend == "reference" or torch.compiler.is_compiling():
        return
    for name, tensor in named.items():
        wrapped = tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        dual = (
            tensor is not None
            and forward_ad._current_level >= 0
            and forward_ad.unpack_dual(tensor).tangent is not None
        )
        if wrapped or dual:
            way = (
                "a transform of torch.func (vmap, jvp, grad, ...)" if wrapped else "forward-mode AD"
            )
            raise RuntimeError(
                f"{name} is under {way}, which "
                f'the backend "{backend}" does not support: use backward() or torch.autograd.grad, '
                'or backend="reference"'
            )


def _check_head(
    side: str, states: tuple[Tensor, ...], weight: Tensor | None, bias: Tensor | None
) -> None:
    width = states[0].shape[-1]
    if weight is not None:
        _require_float(f"{side}_weight", weight)
        if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] == 0:
            raise ValueError(
                f"{side}_weight has shape {tuple(weight.shape)}, but {side}_hidden has width "
                f"{width}: it must be "
                f"(vocabulary, {width}) as in torch.nn.Linear"
            )
    if bias is not None:
        _require_float(f"{side}_bias", bias)
        if weight is None:
            raise ValueError(
                f"{side}_bias was given without {side}_weight: add it to the hidden states instead"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{side}_bias has shape {tuple(bias.shape)}, {side}_weight {tuple(weight.shape)}: "
                "it must be "
                f"({weight.shape[0]},)"
            )


def _columns(
    options: LossOptions, student_weight: Tensor, teacher_weight: Tensor | None, teacher_width: int
) -> int:
    """How many columns of the two models' values are compared."""
    student_rows = student_weight.shape[0]
    if teacher_weight is None:
        if options.vocab_size is not None:
            raise ValueError(
                f"vocab_size={options.vocab_size} was given with teacher_weight=None: feature "
                "space has no vocabulary"
            )
        if student_rows != teacher_width:
            raise ValueError(
                f"student_weight has shape {tuple(student_weight.shape)}, but with "
                "teacher_weight=None it must project "
                f"to the teacher's width {teacher_width}: ({teacher_width}, "
                f"{student_weight.shape[1]})"
            )
        return teacher_width
    smaller = min(student_rows, teacher_weight.shape[0])
    if options.vocab_size is None:
        if student_rows != teacher_weight.shape[0]:
            raise ValueError(
                f"student_weight has {student_rows} rows and teacher_weight "
                f"{teacher_weight.shape[0]}: the vocabularies "
                f"differ. If one is only padded, pass vocab_size=N (at most {smaller}) to compare "
                "the first N tokens"
            )
        return student_rows
    if options.vocab_size > smaller:
        raise ValueError(
            f"vocab_size={options.vocab_size} is larger than a vocabulary (student {student_rows}, "
            "teacher "
            f"{teacher_weight.shape[0]})"
        )
    return options.vocab_size


def _check_space(options: LossOptions, feature_space: bool, layers: int) -> None:
    if not feature_space:
        return
    for name in (
        "student_softcap",
        "teacher_softcap",
        "student_logit_scale",
        "teacher_logit_scale",
        "temperature",
        "output_temperature",
    ):
        value = getattr(options, name)
        if value not in (None, 1.0):
            raise ValueError(
                f"{name}={value} was given with teacher_weight=None: feature space compares raw "
                "features, without "
                "softmax, soft cap or scale"
            )
    if options.ce_weight:
        raise ValueError(
            f"ce_weight={options.ce_weight} needs logits: pass teacher_weight, or ce_weight=0"
        )
    if options.alpha and options.trajectory not in FEATURE_DISTANCES:
        raise ValueError(
            f"trajectory={options.trajectory!r} compares distributions, but teacher_weight=None "
            "means feature space: "
            f"pass one of {', '.join(map(repr, FEATURE_DISTANCES))}, or a teacher_weight"
        )
    if layers == 1 and not options.output_in_dynamics:
        raise ValueError(
            "in feature space (teacher_weight=None) the last hidden state alone leaves nothing to "
            "compare: pass the "
            "sampled layers before it, or output_in_dynamics=True"
        )


def _check_tokens(
    name: str, tensor, leading_shape: tuple[int, ...], device: torch.device, dtypes: tuple
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{name} is a {describe(tensor)}: expected "
            f"{' or '.join(str(d).split('.')[1] for d in dtypes)}"
        )
    if tuple(tensor.shape) != leading_shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but the hidden states have {leading_shape} "
            "before their width: "
            "one entry per hidden state"
        )
    _require_plain(name, tensor)
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and student_hidden on {device}: move it")


def _check_teacher_is_constant(teacher_tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in teacher_tensors.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but the loss never sends gradient to the teacher: run the "
                "teacher under "
                "torch.no_grad() and call teacher.requires_grad_(False), or pass .detach()"
            )


class _SpecBuilder:
    """Collects reads and moment targets, each stated once."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.moments: list[PairMoments] = []

    def request(self, layer: int, temperature: float, divergence: str | None) -> int:
        request = Request(layer, layer, temperature, divergence)
        # any reading of this layer at this temperature of both models has its log-sum-exps
        if divergence is None:
            for index, other in enumerate(self.requests):
                if (
                    other.student_layer == layer
                    and other.temperature == temperature
                    and other.divergence != NLL
                ):
                    return index
        if request not in self.requests:
            self.requests.append(request)
        return self.requests.index(request)

    def moment(self, first: int | None, second: int) -> int:
        pair = PairMoments(None if first is None else Layers(first, first), Layers(second, second))
        if pair not in self.moments:
            self.moments.append(pair)
        return self.moments.index(pair)


def make_plan(
    options: LossOptions,
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    labels,
    student_bias,
    teacher_bias,
    mask,
    num_items_in_batch,
) -> tuple[Plan, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Check every argument before any work and decide what is computed.

    Returns the plan and the hidden states of both models as tuples.

    Raises:
        TypeError, ValueError: naming the argument, what it got, and what to do.
        RuntimeError: the backend asked for cannot run here.
    """
    student, teacher = (
        _as_states("student_hidden", student_hidden),
        _as_states("teacher_hidden", teacher_hidden),
    )
    device, leading_shape, count = student[0].device, tuple(student[0].shape[:-1]), len(student)
    if len(teacher) != count:
        raise ValueError(
            f"student_hidden has {count} layers and teacher_hidden {len(teacher)}: layers are "
            "paired by rank, pass as "
            "many of each"
        )
    if tuple(teacher[0].shape[:-1]) != leading_shape:
        raise ValueError(
            f"teacher_hidden has leading shape {tuple(teacher[0].shape[:-1])}, student_hidden "
            f"{leading_shape}: both "
            "models must have seen the same tokens"
        )
    if student_weight is None:
        raise TypeError(
            "student_weight is None: pass the student's LM head (V, width), or a projection to the "
            "teacher's width"
        )
    _check_head("student", student, student_weight, student_bias)
    _check_head("teacher", teacher, teacher_weight, teacher_bias)
    named = {
        "student_weight": student_weight,
        "student_bias": student_bias,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
    }
    named |= {f"student_hidden[{i}]": h for i, h in enumerate(student)}
    named |= {f"teacher_hidden[{i}]": h for i, h in enumerate(teacher)}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device} and student_hidden[0] on {device}: move one of them"
            )
    if device.type == "meta" and not torch.compiler.is_compiling() and not is_recording():
        raise ValueError(
            f"student_hidden[0] is a {describe(student[0])}, which holds no numbers: make the "
            "models on a device and load "
            "their values, or trace the loss under torch._subclasses.FakeTensorMode"
        )
    _check_teacher_is_constant({k: v for k, v in named.items() if k.startswith("teacher")})
    feature_space = teacher_weight is None
    _check_space(options, feature_space, count)
    columns = _columns(options, student_weight, teacher_weight, teacher[0].shape[-1])
    if labels is not None:
        _check_tokens("labels", labels, leading_shape, device, (torch.int64, torch.int32))
    if mask is not None:
        _check_tokens(
            "mask", mask, leading_shape, device, (torch.bool, torch.int64, torch.int32, torch.uint8)
        )
    if options.ce_weight and labels is None:
        raise ValueError(f"ce_weight={options.ce_weight} needs labels: pass labels, or ce_weight=0")
    if options.shift and (labels is None or labels.ndim == 0):
        raise ValueError(
            "shift=True shifts the labels along their last dimension: pass labels of shape (..., "
            "sequence)"
        )
    check_normaliser(options, num_items_in_batch)
    plan = lay_out(
        options,
        columns,
        count,
        leading_shape,
        feature_space,
        resolve_backend(options.backend, device),
    )
    _check_transforms(named | {"labels": labels, "mask": mask}, plan.backend)
    if not torch.compiler.is_compiling() and os.environ.get(DEBUG_SWITCH, "0") not in ("", "0"):
        _check_finite(named)
    return plan, student, teacher


def check_normaliser(options: LossOptions, num_items_in_batch) -> None:
    """Refuse what cannot divide a sum; a tensor, whose value would take a host sync, may be 0."""
    if num_items_in_batch is None:
        return
    if options.reduction == "none":
        raise ValueError(
            'num_items_in_batch divides a sum, but reduction="none" returns one value per token'
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"num_items_in_batch has shape {tuple(num_items_in_batch.shape)}: pass one number"
            )
    elif isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, (int, float)):
        raise TypeError(
            "num_items_in_batch must be a number or a tensor, got "
            f"{type(num_items_in_batch).__name__}"
        )
    elif not 0 < num_items_in_batch < math.inf:
        raise ValueError(
            f"num_items_in_batch={num_items_in_batch} must be greater than 0: skip a batch without "
            "valid tokens, or pass a "
            "tensor, for which 0 gives a loss of 0"
        )


def _check_finite(named: dict[str, Tensor | None]) -> None:
    """The debug switch: refuse NaN anywhere, and infinities anywhere but -inf in a bias (a padded
    vocabulary).
    """
    for name, tensor in named.items():
        if tensor is None:
            continue
        bad = ~tensor.detach().isfinite()
        if name.endswith("bias"):
            bad &= ~tensor.detach().isneginf()
        if bad.any():
            raise ValueError(
                f"{name} has {int(bad.sum())} entries that are NaN or infinite ({describe(tensor)})"
            )


def check_labels(labels: Tensor, ignore_index: int, columns: int) -> None:
    """Refuse labels that are neither `ignore_index` nor a column: at once on a CPU, without a host
    sync elsewhere.

    Raises:
        ValueError: on a CPU in eager mode; on other devices and in compiled code an assertion fails
            at run time.
    """
    legal = (labels == ignore_index) | ((labels >= 0) & (labels < columns))
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(legal.all(), f"labels outside [0, {columns}) that are not ignore_index")
    elif not legal.all():
        raise ValueError(
            f"labels contains {int(labels[~legal][0])}, which is neither "
            f"ignore_index={ignore_index} nor a token in "
            f"[0, {columns}): mark the position with ignore_index or correct the token"
        )


def lay_out(
    options: LossOptions,
    columns: int,
    count: int,
    leading_shape: tuple[int, ...],
    feature_space: bool,
    backend: str,
) -> Plan:
    """Turn options into reads and moment targets; work whose weight is 0 is left out."""
    builder = _SpecBuilder()
    final = count - 1
    dynamics = range(count if options.output_in_dynamics else final)
    temperature = options.temperature
    trajectory: list[int] = []
    if options.alpha:
        for layer in dynamics:
            if options.trajectory in DIVERGENCES:
                trajectory.append(builder.request(layer, temperature, options.trajectory))
            else:
                trajectory.append(builder.moment(None, layer))
    derivative: list[int] = []
    derivative_requests: list[tuple[int, int]] = []
    if options.beta and options.derivative is not None:
        for first, second in zip(dynamics, dynamics[1:]):
            derivative.append(builder.moment(first, second))
            if not feature_space and options.derivative != "centered_cosine":
                requests = (
                    builder.request(first, temperature, None),
                    builder.request(second, temperature, None),
                )
                derivative_requests.append(requests)
    output_kd = ce = None
    if options.output_kd_weight and not feature_space:
        output_kd = builder.request(final, options.output_temperature, "kl")
    if options.ce_weight:
        ce = builder.request(final, 1.0, NLL)
    if not (builder.requests or builder.moments):
        raise ValueError(
            f"nothing to compute: {count} hidden state(s) with "
            f"output_in_dynamics={options.output_in_dynamics}, "
            f"alpha={options.alpha}, beta={options.beta}, derivative={options.derivative!r}, "
            f"output_kd_weight={options.output_kd_weight}, ce_weight={options.ce_weight}: give a "
            "term a weight, or more layers"
        )
    used = sorted(
        {r.student_layer for r in builder.requests}
        | {layers.student for pair in builder.moments for layers in pair.layers}
    )
    at = {layer: index for index, layer in enumerate(used)}

    def place(layers: Layers | None) -> Layers | None:
        return None if layers is None else Layers(at[layers.student], at[layers.teacher])

    spec = LensSpec(
        columns=columns,
        requests=tuple(
            [
                r._replace(student_layer=at[r.student_layer], teacher_layer=at[r.teacher_layer])
                for r in builder.requests
            ]
        ),
        moments=tuple([PairMoments(place(m.first), place(m.second)) for m in builder.moments]),
        moment_temperature=temperature,
        student_logit_scale=options.student_logit_scale,
        student_softcap=options.student_softcap,
        teacher_logit_scale=options.teacher_logit_scale,
        teacher_softcap=options.teacher_softcap,
    )
    return Plan(
        options=options,
        backend=backend,
        feature_space=feature_space,
        leading_shape=leading_shape,
        layers=tuple(used),
        spec=spec,
        output_kd=output_kd,
        ce=ce,
        trajectory=tuple(trajectory),
        derivative=tuple(derivative),
        derivative_requests=tuple(derivative_requests),
    )
