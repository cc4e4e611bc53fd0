"""Compute the loss of a batch for Hugging Face causal LMs, in any training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from fdd_kernels.hf.batches import check_batch
from fdd_kernels.hf.compiled import compile_blocks
from fdd_kernels.hf.heads import Head
from fdd_kernels.hf.layers import paired_layers
from fdd_kernels.hf.loss import DistillationLoss
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.positions import valid_positions
from fdd_kernels.hf.routers import RouterLoss, router_coefficient
from fdd_kernels.hf.targets import StudentSide, Targets
from fdd_kernels.hf.teachers import Teacher, as_teacher, model_states, require_model
from fdd_kernels.hf.wrappers import data_parallel, inside_forward, own_rows
from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms, LossOptions
from fdd_kernels.objectives.reduction import safe_denominator


class DistillerTerms(FDDLossTerms):
    """`FDDLossTerms` of a `Distiller`, with one more term for a student with experts.

    Attributes:
        router: the load balancing loss of a student with experts and
            `config.output_router_logits`, unweighted like the others; `loss` includes it with the
            model's own coefficient. Otherwise None.
    """

    router: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Return every term by its name, for logs; `router` only if there is one."""
        return self._asdict() | ({} if self.router is None else {"router": self.router})


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
            there.
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
        self.student = ModelReader(student, "student", split_head=split)
        self.teacher = as_teacher(teacher, split_head=split, student=student)
        self._student = student  # as given: perhaps data-parallel
        self.student_layers, self.teacher_layers = paired_layers(
            self.config, self.student.depth, self.teacher.depth
        )
        self._require_shared_vocabulary()
        compile_blocks(student, self.student.blocks)
        self.options = self._loss_options()
        self._compare = DistillationLoss()
        self._require_trainable(self.student.read_head())
        self.teacher.require(self.config, self.options, self._needed(self.teacher_layers))

    def _require_shared_vocabulary(self) -> None:
        vocabularies = self.student.vocabulary, self.teacher.vocabulary
        if self.config.vocab_size is None and vocabularies[0] != vocabularies[1]:
            raise ValueError(
                f"the student's vocabulary has {vocabularies[0]} entries and the teacher's "
                f"{vocabularies[1]}: if one is only padded, set FDDConfig(vocab_size=N) with N <= "
                f"{min(vocabularies)} to compare the first N tokens"
            )
        if (self.config.vocab_size or 0) > min(vocabularies):
            raise ValueError(
                f"vocab_size={self.config.vocab_size} is larger than a vocabulary (student "
                f"{vocabularies[0]}, teacher {vocabularies[1]})"
            )

    def _needed(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sampled layers that the loss uses."""
        return layers if self.config.compares_dynamics else ()

    def _loss_options(self) -> LossOptions:
        """Return the config's loss options, with the models' soft caps and scales where it has
        none.
        """
        given = {f.name: getattr(self.config, f.name) for f in fields(LossOptions)}
        for side, model in (("student", self.student), ("teacher", self.teacher)):
            if given[f"{side}_softcap"] is None:
                given[f"{side}_softcap"] = model.transform.softcap
            if given[f"{side}_logit_scale"] is None:
                given[f"{side}_logit_scale"] = model.transform.scale
        return LossOptions(**given)

    def _require_trainable(self, head: Head) -> None:
        if self.config.train_head and head.requires_grad and head.storage != "parameter":
            raise ValueError(
                f"the student's head is {head.storage} and asks for gradient, which cannot reach "
                "it: pass FDDConfig(train_head=False), freeze it (requires_grad_(False)), or train "
                "a LoRA adapter on it"
            )

    def parameters_without_gradient(self) -> list[str]:
        """Return the names of the student's parameters that train but get no gradient from this
        loss.

        They belong to the head with `train_head=False`, and to blocks after the last state that the
        loss needs. DistributedDataParallel waits for all gradients unless it is given
        `find_unused_parameters=True`.
        """
        model, idle = self.student.model, []
        if not self.config.train_head:
            idle.append(self.student.head)
        if not self._runs_to_the_end:
            idle.extend(self.student.blocks[max(self._needed(self.student_layers), default=0) :])
        if not idle:
            return []
        idle = {module for part in idle for module in part.modules()}
        reached = {
            id(p)
            for module in model.modules()
            if module not in idle
            for p in module.parameters(recurse=False)
        }
        return [
            name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached
        ]

    @property
    def _runs_to_the_end(self) -> bool:
        """Whether the loss needs the student's last block. A router loss does: every block has
        routers.
        """
        output = self.options.compares_output or bool(self.options.ce_weight)
        return output or bool(router_coefficient(self.student.model))

    def count_positions(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Count the valid positions of a batch, an int64 scalar: the denominator of the mean."""
        check_batch(batch)
        return valid_positions(batch, self.config.ignore_index).sum()

    def teacher_states(self, batch: Mapping[str, Tensor]) -> Targets:
        """Return the teacher's targets: its sampled states and its final state, ready for its head,
        L tensors (batch, sequence, Dt); of a cached summary `SummaryTargets`.

        The last state is None, and the teacher stops after its last sampled layer, if the loss does
        not need the final state: no output KD, and no `output_in_dynamics`. Pass the targets to
        several students' `distiller(batch, teacher_states=...)` to run the teacher once.
        """
        return self.teacher.targets(
            batch,
            self._needed(self.teacher_layers),
            apply_final_norm=self.config.apply_final_norm,
            final=self.options.compares_output,
        )

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        *,
        num_items_in_batch: Tensor | float | None = None,
        teacher_states: Targets | None = None,
        student: nn.Module | None = None,
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
                computed.
            TypeError: `batch` is no mapping of tensors.
        """
        check_batch(batch)
        if student is not None:
            compile_blocks(student, self.student.blocks)
        model = self._student if student is None else student
        self._require_gradients_for(model)
        if teacher_states is None:
            teacher_states = self.teacher_states(batch)
        with inside_forward(model, self._loss) as loss:
            values, router = loss(batch, teacher_states, num_items_in_batch)
        terms = DistillerTerms(*values)
        terms.router = router
        return terms

    def _require_gradients_for(self, model: nn.Module) -> None:
        """Raise ValueError if DistributedDataParallel would wait for gradients that this loss does
        not compute.
        """
        wrapper = data_parallel(model)
        is_ddp = isinstance(wrapper, nn.parallel.DistributedDataParallel)
        if not is_ddp or not torch.is_grad_enabled():
            return
        if wrapper.find_unused_parameters or wrapper.static_graph:
            return
        names = self.parameters_without_gradient()
        if names:
            raise ValueError(
                f"{len(names)} parameters that train, {names[0]} for one, get no gradient from "
                f"this loss (train_head={self.config.train_head}, "
                f"output_kd_weight={self.config.output_kd_weight:g}), and DistributedDataParallel "
                "would wait for it: wrap the student with find_unused_parameters=True "
                "(TrainingArguments(ddp_find_unused_parameters=True), accelerate's "
                "DistributedDataParallelKwargs, Lightning's "
                'strategy="ddp_find_unused_parameters_true"), or freeze them with '
                "requires_grad_(False) before"
            )

    def _loss(
        self, batch: Mapping[str, Tensor], targets: Targets, num_items_in_batch
    ) -> tuple[FDDLossTerms, Tensor | None]:
        """Compute the terms, and the router loss or None; `loss` includes it."""
        coefficient, routers = router_coefficient(self.student.model), RouterLoss(self.student)
        layers, norm = self._needed(self.student_layers), self.config.apply_final_norm
        with routers if coefficient else contextlib.nullcontext():
            states = model_states(
                self.student, batch, layers, apply_final_norm=norm, final=self._runs_to_the_end
            )
        # Anew in each step: the head may have been resized, replaced or adapted.
        head = self.student.read_head()
        self._require_trainable(head)
        weight, bias, vocabulary = head.weight, head.bias, len(head.weight)
        if not self.config.train_head:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self.vocab_group is not None:
            weight, bias = (
                own_rows("the student's head", t, self.vocab_group, vocabulary)
                for t in (weight, bias)
            )
        student = StudentSide(states, weight, bias, vocabulary)
        terms = self._compare(
            student,
            self.teacher,
            targets,
            batch,
            self.options,
            num_items_in_batch,
            self.vocab_group,
        )
        if not coefficient:
            return terms, None
        share = self._share(batch, num_items_in_batch).to(terms.loss.device)
        router = routers(batch).to(terms.loss) * share
        return terms._replace(loss=terms.loss + coefficient * router), router.detach()

    def _share(
        self, batch: Mapping[str, Tensor], num_items_in_batch: Tensor | float | None
    ) -> Tensor:
        """Return the batch's valid positions divided by the denominator of its terms: 1, or its
        share of an optimizer step.
        """
        count = self.count_positions(batch).float()
        if num_items_in_batch is not None:
            return (count / safe_denominator(num_items_in_batch)).to(count.dtype)
        return count if self.options.reduction == "sum" else count.clamp(max=1)
