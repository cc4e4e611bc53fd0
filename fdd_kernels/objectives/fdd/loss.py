"""One FDD call, from the caller's tensors and options to the engine's `Call`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels.engine.agreement import Answer, agree, check_group
from fdd_kernels.engine.cached_logits import row_block
from fdd_kernels.engine.evaluate import Call
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.objectives.fdd.objective import FDDObjective
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import Plan, make_plan
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.numbers import check_labels
from fdd_kernels.objectives.reduction import loss_denominator


def fdd_call(
    inputs: LossInputs,
    options: LossOptions,
    vocab_group: torch.distributed.ProcessGroup | None = None,
) -> Call:
    """Check and plan a call of `fused_fdd_loss`; see there for tensors, options and errors."""
    if vocab_group is not None:
        return _call_of_shard(inputs, options, vocab_group)
    plan, tensors = prepare(inputs, options)
    labelled = plan.spec.columns if options.ce_weight else len(inputs.student_weight)
    if tensors.labels is not None and not plan.feature_space:
        check_labels(tensors.labels, options.ignore_index, labelled)
    denominator = _denominator(options, tensors, inputs.num_items_in_batch)
    tensors, weights = inputs.weighted(tensors)
    if plan.backend == "reference":
        objective = FDDObjective(plan, tensors.valid, denominator, None, weights)
        return Call(objective, tensors, plan.backend)
    used = used_by(plan, tensors)
    objective = FDDObjective.of(plan, used, denominator, weights)
    return Call(objective, used, plan.backend, row_block(objective, used, plan.backend))


def prepare(inputs: LossInputs, options: LossOptions) -> tuple[Plan, LensInputs]:
    """Check and plan a call; return the tensors with R rows and the states of every layer."""
    plan, inputs = make_plan(options, inputs)
    if options.shift:
        inputs = inputs.shifted(options.ignore_index)
    return plan, inputs.flattened(options.ignore_index, plan.student_layers, plan.teacher_layers)


def _denominator(options: LossOptions, tensors: LensInputs, items) -> Tensor | float | None:
    return loss_denominator(options.reduction, tensors.rows, tensors.valid, tensors.device, items)


def used_by(plan: Plan, tensors: LensInputs) -> LensInputs:
    """Drop the tensors that the plan's spec does not look at."""
    used = tensors.of_layers(plan.student_layers, plan.teacher_layers)
    return used._replace(labels=None) if plan.ce is None else used


def _call_of_shard(inputs: LossInputs, options: LossOptions, group) -> Call:
    """Make this process's call, once all processes of `group` agree to begin."""
    check_group(group)
    prepared: list[tuple[Plan, LensInputs, Tensor | float | None, Tensor | None]] = []

    def answer() -> Answer:
        plan, tensors = prepare(inputs, _options_of_part(inputs, options))
        denominator = _denominator(options, tensors, inputs.num_items_in_batch)
        tensors, weights = inputs.weighted(tensors)
        prepared.append((plan, tensors, denominator, weights))
        used = used_by(plan, tensors)
        block_rows = row_block(FDDObjective(plan, None, denominator), used, plan.backend)
        alike = replace(plan.spec, columns=0), replace(options, backend="auto"), plan.leading_shape
        return Answer.of(used, block_rows, alike)

    shard, block_rows = agree(group, answer, options.vocab_size)
    plan, tensors, denominator, weights = prepared[0]
    plan = replace(plan, options=options, spec=replace(plan.spec, columns=shard.columns))
    if tensors.labels is not None:
        labelled = shard.bounds[-1] if options.ce_weight else shard.vocabulary
        check_labels(tensors.labels, options.ignore_index, labelled)
        tensors = tensors._replace(labels=shard.own_labels(tensors.labels))
    used = used_by(plan, tensors)
    objective = FDDObjective.of(plan, used, denominator, weights)
    return Call(objective, used, plan.backend, block_rows, shard)


def _options_of_part(inputs: LossInputs, options: LossOptions) -> LossOptions:
    """Return the options for a process's rows of the heads, not knowing yet how many compare.

    Raises:
        ValueError: feature space, or the dense reference.
    """
    if inputs.teacher_weight is None:
        raise ValueError(
            "vocab_group splits LM heads over processes, but teacher_weight=None means feature "
            "space: a projection is small, keep all of it on every process and leave "
            "vocab_group=None"
        )
    if options.backend == "reference":
        raise ValueError(
            'backend="reference" keeps dense tensors of one process and knows no vocab_group: '
            "gather the heads, or use another backend"
        )
    heads = inputs.student_weight, inputs.teacher_weight
    rows = [w.shape[0] for w in heads if isinstance(w, Tensor) and w.ndim == 2]
    return replace(options, vocab_size=min(rows)) if len(rows) == 2 and min(rows) else options
