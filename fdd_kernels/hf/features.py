"""Compare the states of sampled layers themselves, and predictions at the output alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fdd_kernels.engine.evaluate import evaluate
from fdd_kernels.hf.alignment import LayerAlignment
from fdd_kernels.hf.comparison import Comparison
from fdd_kernels.hf.loss import hidden_inputs
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.positions import TOKEN_WEIGHTS
from fdd_kernels.hf.projection import make_projection
from fdd_kernels.hf.targets import HiddenTargets, StudentSide
from fdd_kernels.hf.teachers import LiveTeacher, Teacher
from fdd_kernels.objectives.fdd.loss import fdd_call
from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms, LossOptions
from fdd_kernels.objectives.features.deltas import row_deltas
from fdd_kernels.objectives.inputs import LossInputs


class Rows(NamedTuple):
    """Tokens that are compared.

    Attributes:
        mask: (batch, sequence) bool.
        weights: their factors, (batch, sequence), or None.
        items: the denominator of the sum over them; None: their number.
    """

    mask: Tensor
    weights: Tensor | None
    items: Tensor | float | None


class FeatureLoss(Comparison):
    """`loss(student, teacher, targets, batch, options)` -> `FDDLossTerms` with trajectory and
    derivative of states, the output of each sampled block after the backbone's last norm.

    Output KD and cross-entropy are those of the models' heads: a second call, without layers.

    Raises:
        ValueError: a teacher that is not run, or heads that are split.
    """

    _reading: ClassVar[Mapping[str, bool]] = {"features": True}

    def __init__(
        self,
        config: FDDConfig,
        student: ModelReader,
        teacher: Teacher,
        layers: tuple[tuple[int, ...], tuple[int, ...]],
        alignment: LayerAlignment | None = None,
        vocab_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(teacher, LiveTeacher):
            raise ValueError(
                f'space="feature" compares the states of the teacher itself, but {teacher.name} '
                f"is a {type(teacher).__name__}: give the teacher, or "
                'space="lens"'
            )
        if vocab_group is not None:
            raise ValueError(
                'vocab_group splits LM heads over processes, but space="feature" compares states: '
                'leave vocab_group=None, or give space="lens"'
            )
        if config.output_in_dynamics:
            layers = (*layers[0], student.depth), (*layers[1], teacher.depth)
        super().__init__(config, student, teacher, layers, alignment)
        if self._needs_projection():
            self.projection = make_projection(config.projection, student, teacher.reader)

    def __call__(
        self,
        student: StudentSide,
        teacher: Teacher,
        targets: HiddenTargets,
        batch: Mapping[str, Tensor],
        options: LossOptions,
        num_items_in_batch: Tensor | float | None = None,
        step: int | None = None,
    ) -> FDDLossTerms:
        """See `Comparison`.

        Raises:
            ValueError: targets without the final state, where the loss needs it.
        """
        (*states, final), (*others, target) = student.states, targets
        has_layers = options.compares_dynamics and bool(states)
        found = []
        if has_layers:
            found.append(self._dynamics(states, others, batch, options, num_items_in_batch, step))
        if self._needs_final(options) or not has_layers:
            side = student._replace(states=[final])
            alone = replace(options, alpha=0.0, beta=0.0, layer_weights=None)
            found.append(self._output(side, teacher, target, batch, alone, num_items_in_batch))
        # Each is 0 where the other one has a term.
        return FDDLossTerms(*[sum(of_term) for of_term in zip(*found)])

    def _output(
        self,
        student: StudentSide,
        teacher: Teacher,
        target: Tensor | None,
        batch: Mapping[str, Tensor],
        options: LossOptions,
        num_items_in_batch: Tensor | float | None,
    ) -> FDDLossTerms:
        """Compute the terms of the final state alone."""
        inputs = hidden_inputs(student, teacher, [target], batch, options, num_items_in_batch)
        return FDDLossTerms(*evaluate(fdd_call(inputs, options)))

    def _dynamics(
        self,
        states: list[Tensor],
        targets: list[Tensor],
        batch: Mapping[str, Tensor],
        options: LossOptions,
        num_items_in_batch: Tensor | float | None,
        step: int | None,
    ) -> FDDLossTerms:
        """Compute trajectory and derivative of the sampled layers."""
        device = states[0].device
        rows = self._rows(batch, options, num_items_in_batch)
        inputs = state_inputs(
            states,
            targets,
            self.projection,
            mask=rows.mask.to(device),
            rows=self.config.rows,
            num_items_in_batch=rows.items,
            token_weights=None if rows.weights is None else rows.weights.to(device),
        )
        options = _of_states(options)
        if self._alignment is not None:
            count = self.valid_rows(batch).sum()
            options = self._alignment.paired_options(options, inputs, step, count)
        return FDDLossTerms(*evaluate(fdd_call(inputs, options)))

    def _rows(
        self, view: Mapping[str, Tensor], options: LossOptions, items: Tensor | float | None
    ) -> Rows:
        """Return the tokens whose states are compared."""
        return Rows(self.valid_rows(view), view.get(TOKEN_WEIGHTS), items)

    def _needs_projection(self) -> bool:
        return bool(self.config.ever("alpha") or self.config.ever("beta"))

    def _idle(self, options: LossOptions, whole: bool) -> list[nn.Module]:
        idle = super()._idle(options, whole)
        if self._needs_final(options):
            return idle
        parts = self.student.parts
        unused = [parts.head_steps] + [parts.backbone_steps] * (not self.config.apply_final_norm)
        return [*idle, self.student.head, *[m for steps in unused for m in steps.modules]]

    def _compares_final(self, options: LossOptions) -> bool:
        return bool(options.output_kd_weight)


def state_inputs(
    states: list[Tensor],
    targets: list[Tensor],
    projection: nn.Linear | None,
    *,
    mask: Tensor,
    rows: str,
    num_items_in_batch: Tensor | float | None,
    token_weights: Tensor | None,
) -> LossInputs:
    """Return the inputs of a loss that compares states themselves, on the device of the student's.

    Args:
        states: of the student, L x (batch, sequence, Ds).
        targets: of the teacher, L x (batch, sequence, Dt).
        projection: from Ds to Dt; None for the identity.
        mask: valid rows, bool (batch, sequence).
        rows: as `FDDConfig.rows`.
    """
    like = states[0]
    targets = [state.to(like.device) for state in targets]
    if rows == "deviation":
        states, targets = (
            [row_deltas(state, mask=mask).rows for state in of_model]
            for of_model in (states, targets)
        )
    if projection is None:
        weight = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    else:
        weight = projection.weight.to(like.device)
    return LossInputs(
        states,
        weight,
        targets,
        None,
        mask=mask,
        num_items_in_batch=num_items_in_batch,
        token_weights=token_weights,
    )


def _of_states(options: LossOptions) -> LossOptions:
    """Return the options for states alone, the last of which is a layer like the others."""
    names = (
        *("ignore_index", "alpha", "beta", "trajectory", "derivative", "layer_weights"),
        *("derivative_layers", "reduction", "backend"),
    )
    given = {name: getattr(options, name) for name in names}
    return LossOptions(**given, output_kd_weight=0.0, output_in_dynamics=True)
