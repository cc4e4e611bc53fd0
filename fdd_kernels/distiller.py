"""From a batch to the loss for Hugging Face causal LMs, in any training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from fdd_kernels.api import fused_fdd_loss
from fdd_kernels.compiled import compile_blocks
from fdd_kernels.config import FDDConfig, FDDLossTerms, LossOptions
from fdd_kernels.layers import paired_layers
from fdd_kernels.lens import ModelLens
from fdd_kernels.parallel import inside_forward, require_gathered

_NOT_MODEL_INPUTS = ("labels", "num_items_in_batch")


class Distiller:
    """`distiller(batch)` -> `FDDLossTerms` for a student and a teacher that share a vocabulary.

    Args:
        student, teacher: transformers causal LMs on one device (also under peft or torch.compile). The teacher is put in
            evaluation mode and never receives gradient. Neither computes its own logits. Of a model from torch.compile
            the blocks are compiled, in place, with its options.
        config: layers and loss options; soft caps, logit scales are the models' own unless given there.

    Raises:
        TypeError, ValueError: a model whose head, blocks or logits cannot be read (says what was looked for), layers that
            do not exist, vocabularies of different size without `config.vocab_size`.

    Example::

        distiller = Distiller(student, teacher, FDDConfig(alpha=1.0, beta=1.0))
        for batch in loader:                      # input_ids, attention_mask, labels with -100, as the models take them
            terms = distiller(batch)
            terms.loss.backward()
            optimizer.step(); optimizer.zero_grad()

    Data parallelism: wrap the student (DistributedDataParallel, FSDP2's `fully_shard`, accelerate's `prepare`) and call
    `distiller(batch, student=wrapped)`, so that gradients are exchanged. For FSDP2 make the distiller first. Gradients are
    averaged over processes: for the mean over all tokens pass `num_items_in_batch` = their number divided by the number of
    processes.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, config: FDDConfig | None = None) -> None:
        self.config = config or FDDConfig()
        self.student, self.teacher = ModelLens(student, "student"), ModelLens(teacher, "teacher")
        self._models = student, teacher  # as given: perhaps data-parallel
        teacher.eval()
        self.student_layers, self.teacher_layers = paired_layers(self.config, self.student.depth, self.teacher.depth)
        vocabularies = len(self.student.weight), len(self.teacher.weight)
        if self.config.vocab_size is None and vocabularies[0] != vocabularies[1]:
            raise ValueError(
                f"the student's vocabulary has {vocabularies[0]} entries and the teacher's {vocabularies[1]}: if one is only "
                f"padded, set FDDConfig(vocab_size=N) with N <= {min(vocabularies)} to compare the first N tokens"
            )
        compile_blocks(student, self.student.blocks)
        compile_blocks(teacher, self.teacher.blocks)
        self.options = self._loss_options()

    def _loss_options(self) -> LossOptions:
        """The config's loss options with soft caps and scales taken from the models where it leaves them open."""
        given = {f.name: getattr(self.config, f.name) for f in fields(LossOptions)}
        for side, lens in (("student", self.student), ("teacher", self.teacher)):
            if given[f"{side}_softcap"] is None:
                given[f"{side}_softcap"] = lens.transform.softcap
            if given[f"{side}_logit_scale"] is None:
                given[f"{side}_logit_scale"] = lens.transform.scale
        return replace(LossOptions(**given), shift=True)

    def count_positions(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many positions of a batch the loss counts, an int64 scalar: the divisor of its mean."""
        labels, attention = batch.get("labels"), batch.get("attention_mask")
        if labels is not None:
            return (labels[..., 1:] != self.config.ignore_index).sum()
        if attention is not None:
            return (attention != 0).sum()
        return torch.tensor(next(value.shape[0] * value.shape[1] for value in batch.values()))

    @torch.no_grad()
    def teacher_states(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """The teacher's sampled states and its final state, ready for its head: L tensors (batch, sequence, Dt).

        Pass them to several students' `distiller(batch, teacher_states=...)` to run the teacher once.
        """
        with inside_forward(self._models[1], self._states) as states:
            return states(self.teacher, self.teacher_layers, batch)

    def _states(self, lens: ModelLens, layers: tuple[int, ...], batch: Mapping[str, Tensor]) -> list[Tensor]:
        inputs = {key: value for key, value in batch.items() if key not in _NOT_MODEL_INPUTS}
        needed = layers if self.options.alpha or self.options.beta else ()
        sampled, final = lens.states(inputs, needed)
        return [lens.read(state, apply_final_norm=self.config.apply_final_norm) for state in sampled] + [final]

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        *,
        num_items_in_batch: Tensor | float | None = None,
        teacher_states: list[Tensor] | None = None,
        student: nn.Module | None = None,
    ) -> FDDLossTerms:
        """The loss of one batch.

        Args:
            batch: input_ids and attention_mask (batch, sequence), and whatever else both models take. With labels, as a
                causal LM takes them (unshifted, -100 where there is nothing to learn), the state at position t counts
                where labels[t + 1] is not -100; without labels every attended position counts.
            num_items_in_batch: divides the sum over positions instead of their number in this batch.
            teacher_states: the result of `teacher_states(batch)`, of this distiller or of another with the same teacher
                and teacher layers, to save running the teacher again.
            student: the student as it was wrapped for data parallelism after this distiller was made.

        Returns:
            `FDDLossTerms` of scalars.

        Raises:
            RuntimeError: a head is spread over processes where the loss is computed; says what to do.
        """
        if self.teacher.model.training:
            self.teacher.model.eval()
        if student is not None:
            compile_blocks(student, self.student.blocks)
        if teacher_states is None:
            teacher_states = self.teacher_states(batch)
        with inside_forward(self._models[0] if student is None else student, self._loss) as loss:
            return loss(batch, teacher_states, num_items_in_batch)

    def _loss(self, batch: Mapping[str, Tensor], teacher_states: list[Tensor], num_items_in_batch) -> FDDLossTerms:
        require_gathered("the student's head", self.student.weight)
        require_gathered("the teacher's head", self.teacher.weight)
        student_states = self._states(self.student, self.student_layers, batch)
        labels, mask = batch.get("labels"), None
        if labels is None and batch.get("attention_mask") is not None:
            mask = batch["attention_mask"] != 0
        options = self.options if labels is not None else replace(self.options, shift=False)
        weight, bias = self.student.weight, self.student.bias
        if not self.config.train_head:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return fused_fdd_loss(
            student_states, weight, teacher_states[-len(student_states) :], self.teacher.weight.detach(), labels, mask=mask,
            student_bias=bias, teacher_bias=None if self.teacher.bias is None else self.teacher.bias.detach(),
            num_items_in_batch=num_items_in_batch, return_terms=True,
            **{f.name: getattr(options, f.name) for f in fields(LossOptions)},
        )  # fmt: skip
