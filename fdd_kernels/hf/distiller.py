"""Compute the loss of a batch for Hugging Face causal LMs, in any training loop."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fdd_kernels.hf.alignment import alignment_of
from fdd_kernels.hf.comparison import Comparison
from fdd_kernels.hf.comparisons import comparison_of
from fdd_kernels.hf.compatibility import (
    options_for,
    require_same_task,
    require_shared_vocabulary,
)
from fdd_kernels.hf.compiled import compile_blocks
from fdd_kernels.hf.encoder import EncoderLoss
from fdd_kernels.hf.layers import paired_layers
from fdd_kernels.hf.observer import Observer
from fdd_kernels.hf.projection import ProjectionWatch, both_projections
from fdd_kernels.hf.routers import RouterLoss, router_coefficient
from fdd_kernels.hf.schedule import Schedules
from fdd_kernels.hf.targets import StudentSide, Targets
from fdd_kernels.hf.task_reader import make_reader
from fdd_kernels.hf.tasks import require_causal_lm
from fdd_kernels.hf.teachers import Teacher, as_teacher, require_model
from fdd_kernels.hf.terms import DistillerTerms
from fdd_kernels.hf.unreached import (
    is_static,
    refuse_changes,
    refuse_unreached,
    waits_for_all,
)
from fdd_kernels.hf.wrappers import inside_forward
from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms, LossOptions
from fdd_kernels.objectives.reduction import safe_denominator


class Distiller:
    """`distiller(batch)` -> `DistillerTerms` for a student and a teacher that share a vocabulary.

    Args:
        student, teacher: transformers causal LMs (also under peft or torch.compile), with any head
            that `read_head` supports. The teacher is put in evaluation mode and never receives
            gradient. It may be on other devices, offloaded by accelerate or quantised: its states
            and head are copied to the device of the student's head. Neither model computes its own
            logits, nor runs blocks after the last state that the loss needs. The blocks of a model
            from torch.compile are compiled, in place, with its options. One peft model may be both,
            or its base model the teacher: the teacher is then the student without its adapters, and
            the student's modes do not change. A teacher cache
            (`fdd_kernels.teacher_cache.open_teacher_cache`) replaces a teacher; batches then
            consist of its windows.
        config: layers and loss options; soft caps and logit scales are the models' own unless given
            there. If options change during training (`schedules`, ...), pass `step`: see the call.
        vocab_group: the process group over which tensor parallelism splits the rows of the heads
            (DTensors, as `parallelize_module` with `ColwiseParallel` makes them). Its processes
            must see the same batches.

    Raises:
        TypeError, ValueError: a model whose head, blocks or logits are not supported (says what was
            looked for), layers that do not exist or that a cache does not hold, vocabularies of
            different size without `config.vocab_size`, a quantised or offloaded student's head that
            requires gradient.

    Example::

        distiller = Distiller(student, teacher, FDDConfig(alpha=1.0, beta=1.0))
        for batch in loader:  # input_ids, attention_mask, labels with -100, as models take them
            terms = distiller(batch)
            terms.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Data parallelism: wrap the student (DistributedDataParallel, FSDP2's `fully_shard`, accelerate's
    `prepare`) and call `distiller(batch, student=wrapped)`, so that gradients are reduced. For
    FSDP2 make the distiller first. Gradients are averaged over processes: for the mean over all
    tokens pass `num_items_in_batch` = their number divided by the number of processes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher,
        config: FDDConfig | None = None,
        *,
        vocab_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        require_model("student", student)
        if not isinstance(config, FDDConfig | None):
            raise TypeError(
                f"config must be an FDDConfig, got {type(config).__name__}: give "
                "FDDConfig(alpha=..., ...)"
            )
        self.config, self.vocab_group = config or FDDConfig(), vocab_group
        split = vocab_group is not None
        self.task = require_same_task(student, teacher)
        if split:
            require_causal_lm(self.task, "vocab_group")
        self.student = make_reader(student, "student", split_head=split)
        self.teacher = as_teacher(teacher, split_head=split, student=student)
        self._student = student  # as given: perhaps data-parallel
        self.student_layers, self.teacher_layers = paired_layers(
            self.config, self.student.depth, self.teacher.depth
        )
        if self.task.has_lens:
            require_shared_vocabulary(self.config, self.student.vocabulary, self.teacher.vocabulary)
        compile_blocks(student, self.student.all_blocks)
        self.schedules = Schedules(
            self.config, options_for(self.config, self.student, self.teacher)
        )
        self.alignment = alignment_of(
            self.config, self.student_layers, self.teacher_layers, vocab_group
        )
        layers = self.student_layers, self.teacher_layers
        self._compare: Comparison = comparison_of(self.task, self.config)(
            self.config, self.student, self.teacher, layers, self.alignment, vocab_group
        )
        self._compare.require(self.teacher, self.schedules.possible)
        weight = self.config.encoder_weight
        self._encoder = EncoderLoss(self.config, self.student, self.teacher) if weight else None
        of_encoder = None if self._encoder is None else self._encoder.projection
        self._projection = both_projections(self._compare.projection, of_encoder)
        watched = of_encoder or self._compare.projection
        self._watch = None if watched is None else ProjectionWatch(watched, student)

    @property
    def options(self) -> LossOptions:
        """The loss options of the last step, soft caps and scales included."""
        return self.schedules.options

    @property
    def projection(self) -> nn.Module | None:
        """The student's projection to the teacher's width in feature space, an nn.Linear shared by
        the layers; None without one. Its parameters train with the student's: give them to the
        optimizer, and average their gradients over processes, which DistributedDataParallel does
        not do. With `encoder_weight` in feature space an nn.ModuleDict of "decoder" and "encoder".
        """
        return self._projection

    @property
    def _router_coefficient(self) -> float:
        return router_coefficient(self.student.model) if self.task.has_lens else 0.0

    @property
    def observer(self) -> Observer | None:
        """Gets both sides of every batch before its loss; None without one."""
        return self._compare.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._compare.observer = observer

    def idle_projection(self) -> list[str]:
        """Return the names in `projection` of parameters that get no gradient at some step."""
        always = all(map(self._compare.trains_projection, self.schedules.possible))
        if self._compare.projection is None or always:
            return []
        return ["weight" if self.projection is self._compare.projection else "decoder.weight"]

    def parameters_without_gradient(self) -> list[str]:
        """Return the names of the student's parameters that train but get no gradient from this
        loss.

        They belong to the head with `train_head=False`, and to blocks that the loss does not need
        at every step. DistributedDataParallel waits for all gradients unless it is given
        `find_unused_parameters=True`.
        """
        return self._without_gradient(*self.schedules.possible)

    def _without_gradient(self, *possible: LossOptions) -> list[str]:
        whole = bool(self._router_coefficient)  # every block has routers
        found = {n for o in possible for n in self._compare.without_gradient(o, whole=whole)}
        return [name for name, _ in self.student.model.named_parameters() if name in found]

    def count_positions(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Count the valid positions of a batch, an int64 scalar: the denominator of the mean."""
        return self._count(self.task.loss_view(batch))

    def _count(self, view: Mapping[str, Tensor]) -> Tensor:
        return self._compare.valid_rows(view).sum()

    def without_rows_from(self, batch: Mapping[str, Tensor], first: int) -> Mapping[str, Tensor]:
        """Return the batch without valid positions in rows `first` and later: those that a data
        loader repeats.
        """
        return self.task.without_rows_from(batch, first, self.config.ignore_index)

    def teacher_states(self, batch: Mapping[str, Tensor]) -> Targets:
        """Return the teacher's targets: its sampled states and its final state, ready for its head,
        L tensors (batch, sequence, Dt); of a cached summary `SummaryTargets`.

        The last state is None, and the teacher stops after its last sampled layer, if the loss does
        not need the final state at any step: no output KD, and no `output_in_dynamics`. Pass the
        targets to several students' `distiller(batch, teacher_states=...)` to run the teacher once.
        """
        return self._compare.targets(self.teacher, batch, *self.schedules.possible)

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        *,
        num_items_in_batch: Tensor | float | None = None,
        teacher_states: Targets | None = None,
        student: nn.Module | None = None,
        step: int | None = None,
    ) -> DistillerTerms:
        """Compute the loss of one batch.

        Args:
            batch: input_ids and attention_mask (batch, sequence), and whatever else both models
                take (position_ids where padding is on the left). With labels, as a causal LM takes
                them (unshifted, -100 where there is nothing to learn), position t is valid where
                labels[t + 1] is not -100 and attention_mask[t] is not 0. Without labels every
                attended position is valid. `shift_labels` win over labels and are used as they
                are, as in transformers: the label of position t is shift_labels[t]. An
                attention_mask of another shape says nothing of padding. `token_weights` (batch,
                sequence), at least 0, multiply every term of a position and leave the denominator
                as it is. They are never shifted: the prediction of token t + 1 has the weight of
                position t.
            num_items_in_batch: the denominator, instead of the number of valid positions in this
                batch.
            teacher_states: the result of `teacher_states(batch)`, of this distiller or of another
                with the same teacher and teacher layers, to save running the teacher again.
            student: the student as wrapped for data parallelism after this distiller was made.
            step: the optimizer steps done before, the same for all micro-batches of a step. Needed
                in training if the config has options that change (`config.changes`); all processes
                then take the same steps together. Without gradients None is the last step.

        Returns:
            `DistillerTerms`, which are `FDDLossTerms`, of scalars.

        Raises:
            RuntimeError: a head is sharded over processes where the loss is computed; says what to
                do.
            ValueError: `teacher_states` lack the final state, which this loss needs, or are hidden
                states where the teacher is a cached summary; no labels, and an attention_mask of
                another shape; labels that are not one a token; tokens or positions that a model
                does not have; DistributedDataParallel without `find_unused_parameters`, and
                parameters that get no gradient; a router loss that is asked for and cannot be
                computed; no `step` where it is needed, or an earlier one than before.
            TypeError: `batch` is no mapping of tensors.
        """
        view = self.task.loss_view(batch)
        if student is not None:
            compile_blocks(student, self.student.all_blocks)
        model = self._student if student is None else student
        if waits_for_all(model):
            weight = min(options.output_kd_weight for options in self.schedules.possible)
            why = f"train_head={self.config.train_head}, output_kd_weight={weight:g}"
            refuse_unreached(self.parameters_without_gradient(), why)
        elif is_static(model):
            refuse_changes(self._without_gradient(options) for options in self.schedules.possible)
        options = self.schedules.begin(step)
        if teacher_states is None:
            teacher_states = self._compare.targets(self.teacher, batch, options)
        with inside_forward(model, functools.partial(self._loss, options)) as loss:
            values, more = loss(batch, view, teacher_states, num_items_in_batch)
        trains = self._encoder is not None or self._compare.trains_projection(options)
        if self._watch is not None and trains:
            self._watch.look()
        terms = DistillerTerms(*values)
        terms.router, terms.encoder = more
        return terms

    def logged(self) -> dict[str, float]:
        """Return the options that change during training, at the last step, by name, for logs; of a
        layer alignment the mean teacher layer of each student layer.
        """
        pairs = {} if self.alignment is None else self.alignment.mean_layers()
        return self.schedules.values() | pairs

    def state_dict(self) -> dict[str, Any]:
        """Return what the next steps depend on, as JSON can hold it. Call it between two steps, in
        all processes together; it is the same in all.
        """
        alignment = None if self.alignment is None else self.alignment.state_dict()
        return {"schedules": self.schedules.state_dict(), "alignment": alignment}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, in every process: the next step continues with the same numbers.

        Raises:
            ValueError: the state of a distiller with another config.
        """
        if set(state) != {"schedules", "alignment"}:
            raise ValueError(f"the state has {sorted(state)}: it is not of a Distiller")
        if (state["alignment"] is None) != (self.alignment is None):
            raise ValueError(
                f"the state has {'no' if state['alignment'] is None else 'a'} layer alignment, but "
                f"the config has layer_alignment={self.config.layer_alignment!r}: it is of another "
                "config"
            )
        self.schedules.load_state_dict(state["schedules"])
        if self.alignment is not None:
            self.alignment.load_state_dict(state["alignment"])

    def _loss(
        self,
        options: LossOptions,
        batch: Mapping[str, Tensor],
        view: Mapping[str, Tensor],
        targets: Targets,
        items: Tensor | float | None,
    ) -> tuple[FDDLossTerms, list[Tensor | None]]:
        """Compute the terms, and those of routers and encoder or None; `loss` includes them."""
        coefficient, routers = self._router_coefficient, RouterLoss(self.student)
        with routers if coefficient else contextlib.nullcontext():
            student = self._compare.student_side(batch, options, whole=bool(coefficient))
        if self.observer is not None:
            self.observer(student, targets, view, options)

        def compare(side: StudentSide, options: LossOptions, items) -> FDDLossTerms:
            step = self.schedules.step
            return self._compare(side, self.teacher, targets, view, options, items, step)

        count = functools.partial(self._count, view)
        if self.schedules.is_first:
            options = self.schedules.balance(student, count, compare)
        terms = compare(student, options, items)
        self.schedules.record(terms, count, items)
        loss, router, encoder = terms.loss, None, None
        if coefficient:
            share = self._share(count(), items).to(loss.device)
            router = routers(batch).to(loss) * share
            loss = loss + coefficient * router
        if self._encoder is not None:
            encoder = self._encoder(student.states, targets, batch, view, items).to(loss)
            loss = loss + self.config.encoder_weight * encoder
        more = [None if term is None else term.detach() for term in (router, encoder)]
        return terms._replace(loss=loss), more

    def _share(self, count: Tensor, items: Tensor | float | None) -> Tensor:
        """Return the batch's number of valid positions divided by the denominator of its terms: 1,
        or its share of an optimizer step.
        """
        count = count.float()
        if items is not None:
            return (count / safe_denominator(items)).to(count.dtype)
        return count if self.options.reduction == "sum" else count.clamp(max=1)
