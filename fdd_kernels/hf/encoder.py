"""Compare the encoders of two encoder-decoders: the states of sampled blocks themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fdd_kernels.engine.evaluate import evaluate
from fdd_kernels.hf.capture import captured_states, require_gradient
from fdd_kernels.hf.discovery import REMEDY, lists_of_blocks
from fdd_kernels.hf.features import state_inputs
from fdd_kernels.hf.layers import layer_grid
from fdd_kernels.hf.loss import token_weights_of
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.offload import device_of
from fdd_kernels.hf.positions import attended_tokens, valid_positions
from fdd_kernels.hf.projection import make_projection
from fdd_kernels.hf.tail import Recording, final_state
from fdd_kernels.hf.targets import States, Targets
from fdd_kernels.hf.teachers import LiveTeacher, Teacher
from fdd_kernels.hf.wrappers import evaluating
from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.objectives.fdd.loss import fdd_call
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions


class EncoderReader:
    """The encoder of an encoder-decoder: its blocks, and the steps after them (a last norm).

    Args:
        reader: of the whole model.

    Attributes:
        backbone: the encoder.
        blocks: its blocks.
        width: of its output.
        layers: numbers of the blocks whose states `capturing` stores.

    Raises:
        ValueError: the last block's state does not give the encoder's output.
    """

    def __init__(self, reader: ModelReader, config: FDDConfig) -> None:
        self.backbone = reader.model.get_encoder()
        self._name = name = f"{reader.name}'s encoder"
        depth = self.backbone.config.num_hidden_layers
        self.layers = layer_grid(depth, config.num_layers, config.layer_grid)
        self._norms = config.apply_final_norm
        lists = lists_of_blocks(name, self.backbone, depth)
        recording = Recording(self.backbone, nn.Identity(), lists, self.backbone)
        tokens = torch.tensor([[1, 0, 1]], device=device_of(self.backbone))
        with evaluating(self.backbone), torch.no_grad():
            with recording.watching():
                self.backbone(input_ids=tokens)
            for blocks, source in reversed(recording.ended.items()):
                self.blocks, steps = blocks, recording.steps(source, recording.output)
                if steps is not None:
                    self._steps = steps
                    if self._gives_output(1 - tokens, depth):
                        return
        raise ValueError(
            f"{name}: the state after its {depth} blocks does not give its output: leave "
            f"encoder_weight=0. {REMEDY}"
        )

    @property
    def device(self) -> torch.device | None:
        """The device of its inputs; None if FSDP decides."""
        return device_of(self.backbone)

    def _gives_output(self, tokens: Tensor, depth: int) -> bool:
        with captured_states(self.blocks, (depth,)) as states:
            output = final_state(self.backbone(input_ids=tokens))
        found = self._steps(states[depth])
        self.width = output.shape[-1]
        eps = torch.finfo(output.dtype).eps
        return bool((found - output).abs().max() <= 32 * eps * output.abs().max())

    @contextmanager
    def capturing(self) -> Iterator[list[Tensor]]:
        """Yield a list that has the states (batch, sequence, width) of `layers` after the `with`
        block, in which the model runs.
        """
        found: list[Tensor] = []
        with captured_states(self.blocks, self.layers) as states:
            yield found
        require_gradient(self._name, self.blocks, states)
        found.extend(self._steps(states[layer], norms=self._norms) for layer in self.layers)


class EncoderLoss:
    """`loss(student, targets, batch, view, items)` -> the encoders' trajectory plus derivative, a
    scalar.

    A sequence's tokens share the weight of its target tokens: a token has (target tokens of the
    sequence) / (its tokens), and the denominator is that of the other terms. So micro-batches add
    up to one mean.

    Args:
        config: `encoder_weight` is not 0.
        student, teacher: their readers get an `EncoderReader`.

    Attributes:
        projection: maps the student's states to the teacher's width; None where they are equal.

    Raises:
        ValueError: models without an encoder before a decoder, a teacher that is not run, encoders
            that are too shallow.
    """

    def __init__(self, config: FDDConfig, student: ModelReader, teacher: Teacher) -> None:
        is_pair = student.task.name == "seq2seq_lm" and isinstance(teacher, LiveTeacher)
        if not is_pair:
            raise ValueError(
                f"encoder_weight={config.encoder_weight:g} compares the encoders of two "
                f"encoder-decoders, but the models are of the task {student.task}: leave "
                "encoder_weight=0"
            )
        self.config = config
        for reader in (student, teacher.reader):
            reader.encoder = EncoderReader(reader, config)
        self.projection = make_projection(
            config.projection, student.encoder, teacher.reader.encoder
        )
        derivative = config.derivative
        if derivative is not None and DISTANCES[derivative].weighted:
            derivative = "cosine"
        self._options = LossOptions(
            alpha=1.0,
            beta=1.0,
            trajectory=config.encoder_trajectory,
            derivative=derivative,
            output_kd_weight=0.0,
            output_in_dynamics=True,
            reduction=config.reduction,
            backend=config.backend,
        )

    def __call__(
        self,
        student: States,
        targets: Targets,
        batch: Mapping[str, Tensor],
        view: Mapping[str, Tensor],
        num_items_in_batch: Tensor | float | None,
    ) -> Tensor:
        """Compute the loss of one batch.

        Args:
            student, targets: their `encoder` states.
            view: the batch as the other terms see it, with the target tokens.

        Raises:
            ValueError: targets without the encoder's states.
        """
        if not getattr(targets, "encoder", None):
            raise ValueError(
                "teacher_states lack the encoder's states, which encoder_weight asks for: take the "
                "teacher_states of this distiller"
            )
        ignore, device = self.config.ignore_index, student.encoder[0].device
        attended, valid = (
            attended_tokens(batch).to(device),
            valid_positions(view, ignore).to(device),
        )
        weights = token_weights_of(view, device)
        of_targets = (valid if weights is None else valid * weights).sum(1)
        shares = of_targets / attended.sum(1).clamp(min=1)
        items = num_items_in_batch
        if items is None and self.config.reduction == "mean":
            items = valid.sum().clamp(min=1)
        inputs = state_inputs(
            student.encoder,
            targets.encoder,
            self.projection,
            mask=attended,
            rows=self.config.rows,
            num_items_in_batch=items,
            token_weights=shares.unsqueeze(1).expand(attended.shape),
        )
        return evaluate(fdd_call(inputs, self._options))[0]
