"""Find from data which teacher layers each sampled layer of a student learns from."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fdd_kernels.hf.wrappers import all_processes
from fdd_kernels.objectives.alignment.costs import layer_costs
from fdd_kernels.objectives.alignment.matching import align_layers
from fdd_kernels.objectives.alignment.methods import RANK, compares_all_pairs
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.layer_pairs import monotone_path

Matrix = tuple[tuple[float, ...], ...]
_STATE = ("step", "costs", "weights", "derivative_layers")


class LayerAlignment:
    """The pairing of a training's sampled layers, found again every `config.alignment_every` steps.

    `layer_costs` of the first micro-batch of such a step, without gradient and averaged over the
    valid tokens of all processes, become weights by `align_layers`. A step whose costs are not
    finite, or that has no valid token with a weight, leaves the pairing as it is; the next
    micro-batch tries again. The output is not part of it: with `output_in_dynamics` it is paired
    with the output.

    Attributes:
        student_layers, teacher_layers: the sampled layers, Ls and Lt, as in a config.
        step: optimizer steps done before the last matching; None before the first of the training.
        costs: (Ls, Lt) costs of the last matching.
        weights: (Ls, Lt) weights of the pairs; each row sums to 1.
        derivative_layers: for each student layer the index of the teacher layer whose changes the
            derivative compares: the pairing in the order of depth of the least total cost. Each has
            a layer of its own, so that no change is 0, but with "monotone", whose own pairing it
            is, and with fewer layers of the teacher.
    """

    def __init__(
        self, config: FDDConfig, student_layers: tuple[int, ...], teacher_layers: tuple[int, ...]
    ) -> None:
        self.config = config
        self.student_layers, self.teacher_layers = student_layers, teacher_layers
        self.step: int | None = None
        self.costs: Matrix | None = None
        self.weights: Matrix | None = None
        self.derivative_layers: tuple[int, ...] | None = None
        self._trained: int | None = None  # the last step of this training

    def paired_options(
        self,
        options: LossOptions,
        inputs: LossInputs,
        step: int | None,
        count: Tensor | None = None,
    ) -> LossOptions:
        """Return the options of a call with the pairing in them; find it first if it is time.

        All processes must call this together where the pairing is found: the first time, and in
        training at the first micro-batch of such a step.

        Args:
            options: of the loss, with its weights of student layers or None.
            inputs: of the loss; the sampled layers come first among the hidden states.
            step: optimizer steps done so far. Without gradient the last pairing stays.
            count: the denominator of the costs' mean in this process; None: its valid tokens.
        """
        if not options.compares_dynamics:
            return options
        if self._is_due(step):
            self._match(options, inputs, step, inputs.mask.sum() if count is None else count)
        return replace(
            options,
            layer_weights=self._layer_weights(options),
            derivative_layers=self.derivative_layers + (len(self.teacher_layers),) * self._output,
        )

    def mean_layers(self) -> dict[str, float]:
        """Return the mean teacher layer of each student layer, named `aligned_layer/LAYER`."""
        return {
            f"aligned_layer/{layer}": math.fsum(map(operator.mul, row, self.teacher_layers))
            for layer, row in zip(self.student_layers, self.weights or ())
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the layers and the last matching as numbers and lists, also for logs. With it a
        training resumes with the same pairing and at the same steps.
        """
        layers = {
            "student_layers": list(self.student_layers),
            "teacher_layers": list(self.teacher_layers),
        }
        return layers | {name: _as_lists(getattr(self, name)) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: it is of other layers, or of no alignment.
        """
        for name in ("student_layers", "teacher_layers"):
            own, given = list(getattr(self, name)), state.get(name)
            if given != own:
                raise ValueError(
                    f"the state of the layer alignment has {name}={given}, but this training "
                    f"{own}: give the layers it was saved with"
                )
        for name in _STATE:
            setattr(self, name, _as_tuples(state[name]))
        self._trained = None  # the steps that follow are not after those of another training

    @property
    def _output(self) -> bool:
        return self.config.output_in_dynamics

    def _is_due(self, step: int | None) -> bool:
        if self.weights is None:
            return True
        if not torch.is_grad_enabled() or step is None:
            return False
        begins_anew = self._trained is not None and step < self._trained
        self._trained = step
        is_first = self.step is None or begins_anew
        return is_first or step - self.step >= self.config.alignment_every

    def _match(
        self, options: LossOptions, inputs: LossInputs, step: int | None, count: Tensor
    ) -> None:
        """Find the pairing; the same on all processes, bit for bit."""
        costs = self._mean_costs(options, inputs, count)
        usable = bool(costs.isfinite().all() and costs.any())
        if not usable and self.weights is not None:
            return
        costs = costs if usable else torch.zeros_like(costs)
        method, epsilon = self.config.layer_alignment, self.config.alignment_epsilon
        weights = len(costs) * align_layers(costs, method, epsilon=epsilon)
        self.costs, self.weights = _as_tuples(costs.tolist()), _as_tuples(weights.tolist())
        strictly = method != "monotone" and len(self.teacher_layers) >= len(self.student_layers)
        self.derivative_layers = monotone_path(self.costs, strictly=strictly)
        self._warn_of_nothing(options, step)
        # Without gradient it is an evaluation's: the training finds its own.
        self.step = step if usable and torch.is_grad_enabled() else None

    def _warn_of_nothing(self, options: LossOptions, step: int | None) -> None:
        """Warn where every change of the teacher is 0: one layer of it for all of the student's."""
        found, when = set(self.derivative_layers), "" if step is None else f" of step {step}"
        if len(found) == 1 < len(self.student_layers) and options.has_term("derivative"):
            warnings.warn(
                f"the layer alignment{when} pairs teacher layer "
                f"{self.teacher_layers[found.pop()]} with every sampled layer of the student: the "
                "derivative is constant until another pairing is found. Use another "
                'layer_alignment than "monotone", and at least as many teacher layers as student '
                "layers",
                stacklevel=2,
            )

    @torch.no_grad()
    def _mean_costs(self, options: LossOptions, inputs: LossInputs, count: Tensor) -> Tensor:
        """Compute the mean costs (Ls, Lt) over the tokens of all processes, float64 on the CPU; 0
        without a token.
        """
        backend = options.backend if compares_all_pairs(options.backend) else "auto"
        sums = layer_costs(
            inputs.student_hidden[: len(self.student_layers)],
            inputs.student_weight,
            inputs.teacher_hidden[: len(self.teacher_layers)],
            inputs.teacher_weight,
            inputs.labels,
            student_bias=inputs.student_bias,
            teacher_bias=inputs.teacher_bias,
            mask=inputs.mask,
            token_weights=inputs.token_weights,
            ignore_index=options.ignore_index,
            cost=options.trajectory,
            temperature=options.temperature,
            student_softcap=options.student_softcap,
            teacher_softcap=options.teacher_softcap,
            student_logit_scale=options.student_logit_scale,
            teacher_logit_scale=options.teacher_logit_scale,
            num_items_in_batch=1.0,  # sums: processes have different numbers of tokens
            vocab_size=options.vocab_size,
            backend=backend,
        )
        found = torch.cat([sums.double().flatten(), count.to(sums.device).double()[None]])
        group = all_processes()
        if group is not None:
            torch.distributed.all_reduce(found, group=group)
        *costs, tokens = found.tolist()
        return torch.tensor(costs, dtype=torch.float64).view(sums.shape) / max(tokens, 1)

    def _layer_weights(self, options: LossOptions) -> Matrix:
        """Return the weights of all pairs of the dynamics' layers, the output among them."""
        teachers, output = len(self.teacher_layers), self._output
        rows = [row + (0.0,) * output for row in self.weights]
        rows += [(0.0,) * teachers + (1.0,)] * output
        scales = options.layer_weights or (1.0,) * len(rows)
        return tuple(tuple(scale * w for w in row) for scale, row in zip(scales, rows, strict=True))


def alignment_of(
    config: FDDConfig,
    student_layers: tuple[int, ...],
    teacher_layers: tuple[int, ...],
    vocab_group: torch.distributed.ProcessGroup | None,
) -> LayerAlignment | None:
    """Return the alignment that a config asks for, or None.

    Raises:
        ValueError: it asks for one, and the heads are split.
    """
    if config.layer_alignment == RANK:
        return None
    if vocab_group is not None:
        raise ValueError(
            f"vocab_group splits the heads, which layer_alignment={config.layer_alignment!r} "
            'needs whole: leave vocab_group=None, or use layer_alignment="rank"'
        )
    return LayerAlignment(config, student_layers, teacher_layers)


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
