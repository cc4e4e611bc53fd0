"""The options of a distiller that change from step to step, and the state that they depend on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fdd_kernels.hf.targets import StudentSide
from fdd_kernels.hf.wrappers import all_processes
from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.scheduled import WEIGHT_OF_TERM, Scheduled
from fdd_kernels.objectives.gradient_balance import gradient_length
from fdd_kernels.objectives.option_checks import require_int


class Schedules:
    """The loss options of each step, by a config's `schedules`, `stages` and `gradient_balance`.

    Args:
        config: whose schedules are made anew, so that two distillers share no state.
        options: the loss options, soft caps and scales included, without what changes.

    Attributes:
        step: the last step that has begun; None before the first.
        is_first: whether the current micro-batch is the first one of a step that trains.
        options: those of the last step; of step 0 before the first.
        possible: the options at every step at which what the loss needs may change.
    """

    def __init__(self, config: FDDConfig, options: LossOptions) -> None:
        self._config, self._fixed = config, options
        self.possible = tuple(
            dict.fromkeys(replace(options, **values) for values in config.values_at_turns())
        )
        self._begin_anew()

    def _begin_anew(self) -> None:
        config = self._config
        self._scheduled = Scheduled(config.schedules, config.stages, config.gradient_balance)
        self.step: int | None = None
        self.is_first = False
        # TAID's: sums over the step's valid tokens of this process, and their number, (2,).
        self._sums: Tensor | None = None
        self.options = self._options_at(0)

    def _options_at(self, step: int) -> LossOptions:
        """Return the options at a step, with the current state."""
        values = self._scheduled.at(step)
        if self._scheduled.balance is not None:
            for term, factor in self._scheduled.balance.weights.items():
                name = WEIGHT_OF_TERM[term]
                values[name] = factor * values.get(name, getattr(self._fixed, name))
        return replace(self._fixed, **values) if values else self._fixed

    def begin(self, step: int | None) -> LossOptions:
        """Return the options of a micro-batch of `step`.

        While gradients are computed, the first micro-batch of a new step ends the step before:
        TAID takes its loss, over all processes. Step 0 after another one begins anew. Without
        gradients nothing changes, and None is the last step.

        Raises:
            TypeError, ValueError: no step in training, where the options change; a step before the
                last one, where they depend on the steps between.
        """
        if step is not None:
            require_int("step", step, minimum=0)
        self.is_first = False
        if not torch.is_grad_enabled():
            return self.options if step is None else self._options_at(step)
        if step is None:
            if self._config.changes:
                raise ValueError(
                    "step is missing, but the config has options that change during training "
                    f"({', '.join(self._config.changes)}): pass distiller(batch, step=...) with "
                    "the number of optimizer steps that were done before, the same for all "
                    "micro-batches of a step; or compute under torch.no_grad()"
                )
            return self.options
        if step == self.step:
            return self.options
        if step == 0:
            self._begin_anew()
        elif self.step is not None and step < self.step and self._stateful():
            raise ValueError(
                f"step={step} is before the last one, {self.step}, but the options depend on the "
                "steps between: pass increasing steps, 0 to begin anew, or load the state of step "
                f"{step} with distiller.load_state_dict"
            )
        self._end_step()
        self.step, self.is_first = step, True
        self.options = self._options_at(step)
        return self.options

    def record(
        self,
        terms: FDDLossTerms,
        count: Callable[[], Tensor],
        items: Tensor | float | None,
    ) -> None:
        """Add a micro-batch to the step's loss that TAID looks at.

        Args:
            terms: those of the micro-batch.
            count: counts its valid tokens in this process.
            items: its `num_items_in_batch`.
        """
        if self._scheduled.taid is None or not torch.is_grad_enabled():
            return
        options, positions = self.options, count()
        if items is None:
            items = positions.clamp(min=1) if options.reduction == "mean" else 1.0
        loss = options.output_kd_weight * terms.output_kd + options.alpha * terms.trajectory
        items = torch.as_tensor(items, dtype=torch.float64, device=loss.device).reshape(())
        total = loss.detach() * items  # over the micro-batch's valid tokens
        sums = torch.stack([total, positions.to(total)])
        self._sums = sums if self._sums is None else self._sums + sums

    def _end_step(self) -> None:
        """Give TAID the mean loss of the last step. A loss that is not finite is left out, and one
        of 0, as without valid tokens or in a stage without these terms: TAID divides by it.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            return
        total, positions = _over_processes(sums).tolist()
        if 0 < total < math.inf:
            self._scheduled.taid.update(total / positions, step=self.step)

    def balance(
        self,
        student: StudentSide,
        count: Callable[[], Tensor],
        loss_of: Callable[[StudentSide, LossOptions, Tensor], FDDLossTerms],
    ) -> LossOptions:
        """Measure the terms' gradients if it is time, and return the options with new factors.

        Args:
            student: its states are detached for the measurement.
            count: counts the micro-batch's valid tokens in this process.
            loss_of: computes the terms of this micro-batch from a student's side, options and
                `num_items_in_batch`.
        """
        balance = self._scheduled.balance
        if balance is None:
            return self.options
        balance.step, lengths = self.step, {}
        if balance.is_due:
            lengths = self._lengths(student, count(), loss_of)
        balance.advance(lengths)
        self.options = self._options_at(self.step)
        return self.options

    def _lengths(self, student: StudentSide, positions: Tensor, loss_of) -> dict[str, float]:
        """Return the length of each term's gradient at the states, of the mean over the valid
        tokens of all processes; 0 for a term that has no weight at this step.
        """
        states = [None if s is None else s.detach().requires_grad_() for s in student.states]
        used, group = [state for state in states if state is not None], all_processes()
        head = [None if t is None else t.detach() for t in (student.weight, student.bias)]
        side = StudentSide(states, *head, student.vocabulary)
        items = _over_processes(positions.to(used[0].device, torch.float64)).clamp(min=1)
        found, nothing = {}, dict.fromkeys(WEIGHT_OF_TERM.values(), 0.0)
        for term in self._scheduled.balance.ratios:
            found[term] = 0.0
            if self.options.has_term(term):
                alone = replace(self.options, **nothing | {WEIGHT_OF_TERM[term]: 1.0})
                loss = loss_of(side, alone, items).loss
                found[term] = gradient_length(loss, used, group)
        return found

    def values(self) -> dict[str, float]:
        """Return the scheduled and balanced options at the last step, by name."""
        names = list(self._scheduled.names)
        if self._scheduled.balance is not None:
            names += [WEIGHT_OF_TERM[term] for term in self._scheduled.balance.ratios]
        return {name: float(getattr(self.options, name)) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last step as JSON can hold it. Nothing changes here, but all
        processes must call it together.
        """
        ended = copy.copy(self)
        ended._scheduled = copy.deepcopy(self._scheduled)
        ended._end_step()
        states = {name: schedule.state_dict() for name, schedule in ended._stateful().items()}
        return {"step": self.step, "values": self.values(), **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state: the next step continues with the same numbers.

        Raises:
            ValueError: the state of other schedules.
        """
        found = self._stateful()
        given = {*state, *state.get("values", ())}
        wanted = {"step", "values", *found, *self.values()}
        if given != wanted:
            raise ValueError(
                f"the state has {sorted(given)}, but the schedules of this config have "
                f"{sorted(wanted)}: it is of another config"
            )
        self._begin_anew()
        for name, schedule in self._stateful().items():
            schedule.load_state_dict(state[name])
        self.step = state["step"]
        self.options = replace(self._fixed, **state["values"])

    def _stateful(self) -> dict[str, Any]:
        """Return the schedules that depend on the steps before, by what they change."""
        found = {"teacher_mix": self._scheduled.taid, "gradient_balance": self._scheduled.balance}
        return {name: schedule for name, schedule in found.items() if schedule is not None}


def _over_processes(sums: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    group = all_processes()
    if group is None:
        return sums
    total = sums.clone()
    torch.distributed.all_reduce(total, group=group)
    return total
