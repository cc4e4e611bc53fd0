"""The options of the loss, written once, and the terms that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from fdd_kernels.objectives.alignment.methods import RANK
from fdd_kernels.objectives.fdd.config_checks import check_encoder, check_pairs, check_space
from fdd_kernels.objectives.fdd.scheduled import WEIGHT_OF_TERM, Scheduled, check_scheduled
from fdd_kernels.objectives.layer_pairs import (
    LayerPairs,
    LayerWeights,
    checked_derivative_layers,
    checked_layer_weights,
    pair_layers,
)
from fdd_kernels.objectives.option_checks import (
    REDUCTIONS,
    require_choice,
    require_divergence,
    require_head_options,
    require_int,
    require_number,
)
from fdd_kernels.objectives.schedules import Schedule, Stages

if TYPE_CHECKING:  # without torch the command line can show its options
    from torch import Tensor

    from fdd_kernels.objectives.gradient_balance import GradientBalance

LAYER_GRIDS = ("floor", "linspace")
# The published setting: FDDConfig.paper().
PAPER = {"output_kd_weight": 1.0, "alpha": 1.0, "beta": 1.0, "ce_weight": 0.0}
PAPER |= {"output_divergence": "kl", "trajectory": "kl", "derivative": "cosine"}
PAPER |= {"temperature": 1.0, "output_temperature": 1.0, "num_layers": 4, "layer_grid": "floor"}


class FDDLossTerms(NamedTuple):
    """The loss and its parts, each reduced like the loss (scalars, or (...) with reduction="none")
    and without its own weight; `token_weights` and `layer_weights` are in them.

    `loss = output_kd_weight * output_kd + alpha * trajectory + beta * derivative + ce_weight * ce`;
    a term whose weight is 0 is not computed and stands as 0.
    """

    loss: Tensor
    output_kd: Tensor
    trajectory: Tensor
    derivative: Tensor
    ce: Tensor


@dataclass(frozen=True)
class LossOptions:
    """The options of `fused_fdd_loss`, under the same names and with the same meaning; see there.

    Args:
        alpha: weight of the trajectory.
        beta: weight of the derivative.
        output_kd_weight: weight of the divergence at the output.
        ce_weight: weight of cross-entropy on the text itself.
        trajectory: kl, reverse_kl, jsd[:beta], skew_kl[:alpha], skew_reverse_kl[:alpha], tv,
            alpha_beta[:alpha,beta], mse or cosine; such as "jsd:0.1".
        derivative: cosine, centered_cosine, weighted_cosine, mse or none.
        output_divergence: the divergence at the output, as the trajectory's.
        layer_weights: weights of the trajectory's layers, one each, all 1 if not given. Or of its
            pairs of layers, a row for each layer of the student, as in 1,0;0.5,0.5.
        derivative_layers: for each layer of the student, the layer of the teacher that takes its
            place in deltas, counted from 0 among those compared; by rank if not given, with weights
            of pairs the increasing path of most weight.
        temperature: divides the logits of the trajectory.
        derivative_temperature: divides the logits of the derivative; as temperature if not given.
        output_temperature: divides the logits of the output KD.
        teacher_mix: t: the target of KL is softmax((1 - t) z_student + t z_teacher) (TAID).
        scale_by_t2: multiply the output KD by its temperature squared.
        student_softcap, teacher_softcap: soft cap of the model's logits, if not its own.
        student_logit_scale, teacher_logit_scale: scale of the model's logits, if not its own.
        output_in_dynamics: include the output in the layers of trajectory and derivative.
        vocab_size: compare the first tokens only (set automatically where heads are padded
            unequally).
        backend: auto, torch, cpu, triton or reference.
    """

    ignore_index: int = -100
    shift: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    output_kd_weight: float = 1.0
    ce_weight: float = 0.0
    trajectory: str = "kl"
    derivative: str | None = "cosine"
    output_divergence: str = "kl"
    layer_weights: LayerWeights | None = None
    derivative_layers: tuple[int, ...] | None = None
    temperature: float = 1.0
    derivative_temperature: float | None = None
    output_temperature: float = 1.0
    teacher_mix: float = 1.0
    scale_by_t2: bool = False
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    output_in_dynamics: bool = False
    reduction: str = "mean"
    vocab_size: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "output_kd_weight", "ce_weight"):
            require_number(name, getattr(self, name))
        for name in ("temperature", "output_temperature"):
            require_number(name, getattr(self, name), positive=True)
        require_number(
            "derivative_temperature", self.derivative_temperature, positive=True, optional=True
        )
        require_head_options(self)
        from fdd_kernels.lens.divergences import DERIVATIVES, FEATURE_DISTANCES

        if self.trajectory not in FEATURE_DISTANCES:
            require_divergence("trajectory", self.trajectory, FEATURE_DISTANCES)
        require_divergence("output_divergence", self.output_divergence)
        require_choice("derivative", self.derivative, (*DERIVATIVES, None))
        object.__setattr__(self, "layer_weights", checked_layer_weights(self.layer_weights))
        own = checked_derivative_layers(self.derivative_layers)
        object.__setattr__(self, "derivative_layers", own)
        self._check_teacher_mix()
        require_choice("reduction", self.reduction, REDUCTIONS)

    def _check_teacher_mix(self) -> None:
        require_number("teacher_mix", self.teacher_mix)
        if self.teacher_mix > 1:
            raise ValueError(f"teacher_mix={self.teacher_mix} must be in [0, 1]")
        if self.teacher_mix == 1:
            return
        from fdd_kernels.lens.distances import DISTANCES
        from fdd_kernels.lens.divergence_text import parse_divergence

        for name, weight, value in (
            ("trajectory", self.alpha, self.trajectory),
            ("output_divergence", self.output_kd_weight, self.output_divergence),
        ):
            if weight and (value in DISTANCES or parse_divergence(value).name != "kl"):
                raise ValueError(
                    f"teacher_mix={self.teacher_mix} mixes the target of KL, but "
                    f'{name}={value!r}: use {name}="kl", a weight of 0 for that term, or '
                    "teacher_mix=1"
                )

    @property
    def temperature_of_deltas(self) -> float:
        """The temperature of the derivative."""
        given = self.derivative_temperature
        return self.temperature if given is None else given

    @property
    def pairs_all_layers(self) -> bool:
        """Whether `layer_weights` are of pairs: the models may have unequal numbers of layers."""
        return bool(self.layer_weights) and isinstance(self.layer_weights[0], tuple)

    def layer_pairs(self, students: int, teachers: int) -> LayerPairs:
        """Return the pairs of layers that trajectory and derivative compare; see `pair_layers`.

        Without a weight of either there are none: the call may have the final states alone.
        """
        if not self.compares_dynamics:
            return LayerPairs((), ())
        weights = self.layer_weights if self.alpha or self.pairs_all_layers else None
        return pair_layers(weights, self.derivative_layers, students, teachers)

    def has_term(self, term: str) -> bool:
        """Whether a term of `FDDLossTerms` has a weight."""
        is_there = term != "derivative" or self.derivative is not None
        return is_there and bool(getattr(self, WEIGHT_OF_TERM[term]))

    @property
    def compares_dynamics(self) -> bool:
        """Whether the loss looks at the sampled layers."""
        return bool(self.alpha or self.beta)

    @property
    def compares_output(self) -> bool:
        """Whether the loss looks at the teacher's final state."""
        return bool(self.output_kd_weight or (self.output_in_dynamics and self.compares_dynamics))


@dataclass(frozen=True)
class FDDConfig(LossOptions):
    """Layers and loss of a distillation, for `Distiller` and `FDDTrainer`.

    Besides every option of `fused_fdd_loss` (soft caps, logit scales and vocab_size left at None
    are read from the models):

    Args:
        derivative: cosine, centered_cosine, weighted_cosine, mse or none; auto is weighted_cosine,
            and in feature space, which has no probabilities, cosine. `FDDConfig.paper()` has the
            published cosine.
        num_layers: number of layers to sample in each model; 4 is the paper's L_D.
        num_teacher_layers: number of layers to sample in the teacher; num_layers if not given.
            Another number needs a layer_alignment, or weights of pairs in layer_weights.
        layer_grid: "floor" samples Q, 2Q, ..., num_layers * Q with Q = depth // (num_layers + 1),
            the paper's rule; "linspace" spreads num_layers evenly over 1..depth - 1.
        student_layers, teacher_layers: explicit 1-based layers (the state after that many blocks);
            they replace the grid and must be given together. They are paired in order, as many of
            each, unless `layer_weights` are of pairs or there is a `layer_alignment`.
        layer_alignment: how the sampled layers are paired: rank, in order; or from the data, by
            argmin, monotone, attention, sinkhorn or emd, as in `align_layers`. The costs are those
            of the trajectory, and the derivative takes a pairing in the order of depth.
        alignment_every: optimizer steps from one matching to the next; the first is at step 0.
        alignment_epsilon: the temperature of attention and sinkhorn, in units of the costs; it
            follows the costs' spread if not given.
        apply_final_norm: apply the model's final norm to the sampled layers before its head, as to
            the output; in feature space the last norm of its backbone.
        space: lens compares the predictions that each sampled state gives through its model's head;
            feature the states themselves, by trajectory mse or cosine and any derivative but
            weighted_cosine. The output and cross-entropy stay as they are.
        projection: of feature space, to the teacher's width: linear, or auto, which has none where
            the widths are equal.
        rows: of feature space: states, or deviation, each state minus the mean over the valid rows
            of its batch, layer and model.
        pooling: of embedding models, whose output_divergence is cosine or mse: mean over the tokens
            of a sentence, or cls, its first token.
        encoder_weight: weight of the encoder's trajectory plus derivative in an encoder-decoder: of
            states, as in feature space, with a projection and num_layers layers of its own.
        encoder_trajectory: mse or cosine.
        train_head: whether the student's head receives gradient from the loss.
        schedules: options that change during training: a dictionary of alpha, beta,
            output_kd_weight, ce_weight, teacher_mix or a temperature to a `WeightSchedule`, of
            teacher_mix also to a `TAIDSchedule`; or as text
            "alpha=linear:0,1,0,500;teacher_mix=taid:1000". It is stored as text.
        stages: `Stages` that change these options from phase to phase, or as text
            "dynamics=1000:alpha=1,ce_weight=0;task:alpha=0,ce_weight=1".
        gradient_balance: a `GradientBalance` of the terms output_kd, trajectory, derivative and ce,
            whose weights multiply their own; or as text
            "output_kd=1,trajectory=0.5;every=100;smoothing=0.9".
    """

    derivative: str | None = "auto"
    student_logit_scale: float | None = None
    teacher_logit_scale: float | None = None
    num_layers: int = 4
    layer_grid: str = "floor"
    student_layers: tuple[int, ...] | None = None
    teacher_layers: tuple[int, ...] | None = None
    num_teacher_layers: int | None = None
    layer_alignment: str = RANK
    alignment_every: int = 100
    alignment_epsilon: float | None = None
    apply_final_norm: bool = True
    space: str = "lens"
    projection: str = "auto"
    rows: str = "states"
    pooling: str = "mean"
    encoder_weight: float = 0.0
    encoder_trajectory: str = "mse"
    train_head: bool = True
    schedules: Mapping[str, Schedule] | str | None = None
    stages: Stages | str | None = None
    gradient_balance: GradientBalance | str | None = None

    @classmethod
    def paper(cls, **options: Any) -> FDDConfig:
        """Make the published setting of FDD, whatever the defaults are; `options` change it.

        It is the sum, each with weight 1, of KL at the output, KL at the 4 layers of the floor grid
        and the cosine of the change between them, at temperature 1.
        """
        return cls(**(PAPER | options))

    def __post_init__(self) -> None:
        if self.derivative == "auto":
            default = "cosine" if self.space == "feature" else "weighted_cosine"
            object.__setattr__(self, "derivative", default)
        for name in ("student_logit_scale", "teacher_logit_scale"):
            require_number(name, getattr(self, name), positive=True, optional=True)
        given = {k: v for k, v in self.loss_options().items() if "logit_scale" not in k}
        checked = LossOptions(**given)
        for name in ("layer_weights", "derivative_layers"):
            object.__setattr__(self, name, getattr(checked, name))
        require_int("num_layers", self.num_layers, minimum=0)
        require_choice("layer_grid", self.layer_grid, LAYER_GRIDS)
        for name in ("student_layers", "teacher_layers"):
            layers = getattr(self, name)
            if layers is not None:
                object.__setattr__(self, name, tuple(layers))
                for layer in getattr(self, name):
                    require_int(f"{name} entry", layer, minimum=0)
        check_pairs(self)
        check_space(self)
        check_encoder(self)
        if self.reduction == "none":
            raise ValueError(
                'reduction="none" has no meaning for a training step: use "mean" or "sum"'
            )
        for name, text in check_scheduled(self, checked).texts.items():
            object.__setattr__(self, name, text)

    def loss_options(self) -> dict[str, Any]:
        """Return the options that are those of `LossOptions`. The distance of embeddings, which is
        none of them, is left out.
        """
        from fdd_kernels.lens.divergences import FEATURE_DISTANCES

        given = {f.name: getattr(self, f.name) for f in fields(LossOptions)}
        if self.output_divergence in FEATURE_DISTANCES:
            given["output_divergence"] = LossOptions.output_divergence
        return given

    @property
    def dynamics_layers(self) -> int:
        """How many layers of the student trajectory and derivative compare."""
        return _count(self.student_layers, self.num_layers) + self.output_in_dynamics

    @property
    def teacher_dynamics_layers(self) -> int:
        """How many layers of the teacher they compare with."""
        given = self.num_teacher_layers
        sampled = self.num_layers if given is None else given
        return _count(self.teacher_layers, sampled) + self.output_in_dynamics

    @property
    def changes(self) -> tuple[str, ...]:
        """The options by which others change during training. If there are any, a training must
        pass `step` to its `Distiller` and save its state.
        """
        names = ("schedules", "stages", "gradient_balance")
        found = [name for name in names if getattr(self, name) is not None]
        return tuple(found + ["layer_alignment"] * (self.layer_alignment != RANK))

    def values_at_turns(self) -> list[dict[str, float]]:
        """Return the scheduled options at every step where what the loss needs may change."""
        scheduled = Scheduled(self.schedules, self.stages, None)
        return [scheduled.at(step) for step in scheduled.turns]

    def ever(self, name: str) -> float:
        """Return the largest value of an option over all steps: 0 for a weight never given."""
        own = getattr(self, name)
        return max(values.get(name, own) for values in self.values_at_turns())


def _count(layers: tuple[int, ...] | None, sampled: int) -> int:
    return sampled if layers is None else len(layers)
