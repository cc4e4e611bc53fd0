"""One FDD call: check and plan, evaluate, return the terms."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels.engine.agreement import Answer, agree, check_group
from fdd_kernels.engine.cached_logits import row_block
from fdd_kernels.engine.evaluate import evaluate
from fdd_kernels.engine.vocab_parallel import VocabShard
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.objectives.fdd.objective import FDDObjective, reduce_terms
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan, make_plan
from fdd_kernels.objectives.fdd.reference import dense_row_terms
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.objectives.validation import check_labels


def fdd_terms(
    inputs: LossInputs,
    options: LossOptions,
    vocab_group: torch.distributed.ProcessGroup | None = None,
) -> FDDLossTerms:
    """Compute the loss and its terms; see `fused_fdd_loss` for tensors, options and errors."""
    shard = block_rows = None
    if vocab_group is None:
        plan, tensors = prepare(inputs, options)
        compared, vocabulary = plan.spec.columns, len(inputs.student_weight)
    else:
        shard, block_rows, plan, tensors = _prepare_shard(inputs, options, vocab_group)
        compared, vocabulary = shard.bounds[-1], shard.vocabulary
    if tensors.labels is not None and not plan.feature_space:
        check_labels(
            tensors.labels, options.ignore_index, compared if options.ce_weight else vocabulary
        )
        if shard is not None:
            tensors = tensors._replace(labels=shard.own_labels(tensors.labels))
    denominator = loss_denominator(options.reduction, tensors, inputs.num_items_in_batch)
    if plan.backend == "reference":
        rows = dense_row_terms(plan, tensors)
        return reduce_terms(rows, options, tensors.valid, plan.leading_shape, denominator)
    tensors = used_by(plan, tensors)
    objective = FDDObjective.of(plan, tensors, denominator)
    terms = evaluate(objective, tensors, plan.backend, shard=shard, block_rows=block_rows)
    return FDDLossTerms(*terms)


def prepare(inputs: LossInputs, options: LossOptions) -> tuple[Plan, LensInputs]:
    """Check and plan a call; return the tensors with R rows and the states of every layer."""
    plan, inputs = make_plan(options, inputs)
    if options.shift:
        inputs = inputs.shifted(options.ignore_index)
    return plan, inputs.flattened(options.ignore_index, plan.layers)


def used_by(plan: Plan, tensors: LensInputs) -> LensInputs:
    """Drop the tensors that the plan's spec does not look at."""
    used = tensors.of_layers(plan.layers)
    return used._replace(labels=None) if plan.ce is None else used


def _prepare_shard(
    inputs: LossInputs, options: LossOptions, group
) -> tuple[VocabShard, int, Plan, LensInputs]:
    """Prepare this process's part of a call, once all processes of `group` agree to begin.

    Returns its shard, the rows per block that all processes take, plan and tensors.
    """
    check_group(group)
    prepared: list[tuple[Plan, LensInputs]] = []

    def answer() -> Answer:
        plan, tensors = prepare(inputs, _options_of_part(inputs, options))
        prepared.append((plan, tensors))
        denominator = loss_denominator(options.reduction, tensors, inputs.num_items_in_batch)
        used = used_by(plan, tensors)
        block_rows = row_block(FDDObjective(plan, None, denominator, None), used, plan.backend)
        alike = replace(plan.spec, columns=0), replace(options, backend="auto"), plan.leading_shape
        return Answer.of(used, block_rows, alike)

    shard, block_rows = agree(group, answer, options.vocab_size)
    plan, tensors = prepared[0]
    spec = replace(plan.spec, columns=shard.columns)
    return shard, block_rows, replace(plan, options=options, spec=spec), tensors


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
