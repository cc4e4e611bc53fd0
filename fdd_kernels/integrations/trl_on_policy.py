"""TRL's trainers on text that the student generates, with the FDD loss; prompts, sampling and logs
of completions are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import trl
from torch import Tensor, nn

from fdd_kernels.data import IGNORED
from fdd_kernels.hf.tasks import require_causal_lm, task_of
from fdd_kernels.hf.wrappers import unwrap
from fdd_kernels.integrations.hf_trainer import FDDTrainerMixin
from fdd_kernels.integrations.on_policy_options import (
    SFT_OPTIONS,
    require_ignored,
    require_options,
    require_teacher,
    require_texts,
)
from fdd_kernels.integrations.trl_sft import columns_of

try:
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError as error:
    raise ImportError(
        "FDDDistillationTrainer and FDDGKDTrainer need trl.DistillationTrainer and "
        f"trl.experimental.gkd, and trl {trl.__version__} lacks one of them: install trl 1.10 or "
        "later (1.16 is tested). FDDSFTTrainer works without"
    ) from error


class _OnPolicyMixin(FDDTrainerMixin):
    """Check what the trainers that generate have in common, and pass it on to TRL's.

    Args:
        sets: the data sets by name.
        options: further arguments of TRL's trainer and `FDDTrainerMixin`.
    """

    _config_class: type
    # Options of TRL's config, beside `beta`, that would change its loss, with what they may be.
    _fixed: Mapping[str, tuple] = {}
    # Whether TRL's trainer needs the teacher too: it gets the same object.
    _generates_with_teacher = False
    _nothing = (
        "no answer has a token. Look at the prompts, at what ends generation (end tokens, stop "
        "strings, max_completion_length or max_new_tokens) and, with lmbda below 1, at the data"
    )

    def __init__(
        self,
        model: nn.Module | str | None,
        teacher: nn.Module | None,
        args: Any,
        sets: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        name = type(self).__name__
        if isinstance(model, nn.Module):
            require_causal_lm(task_of(unwrap(model)), name)
        if not isinstance(args, self._config_class):
            raise TypeError(
                f"args must be a {self._config_class.__name__}, got {type(args).__name__}: {name} "
                "takes its options of generation from there"
            )
        require_options(name, args, self._config_class, self._fixed)
        require_teacher(name, teacher, options)
        require_texts(name, sets)
        require_ignored(options.get("fdd_config"))
        own = {"teacher_model": teacher if self._generates_with_teacher else None, "args": args}
        super().__init__(model, teacher=teacher, **own, **sets, **options)


class FDDDistillationTrainer(_OnPolicyMixin, DistillationTrainer):
    """A `trl.DistillationTrainer` whose loss is Feature Dynamics Distillation from `teacher` on
    the tokens that the student generated.

    Args:
        model, args, train_dataset, eval_dataset, **options: as for `trl.DistillationTrainer`;
            `model` is the student, `args` a `trl.DistillationConfig`.
        teacher: a transformers causal LM, given once, in place of TRL's `teacher_model`; otherwise
            as for `FDDTrainer`.
        fdd_config: layers and loss options.

    TRL's, unchanged: prompts, sampling (`temperature`, `top_p`, ..., with transformers or vLLM),
    tools, one generation for all micro-batches of a step, logs of completions. The loss is computed
    on prompt and completion, at the positions that predict a generated token; the first end token
    counts, what a tool returned does not. Each sequence begins at position 0, as in generation.

    The loss of an optimizer step is the mean over its generated tokens, of all micro-batches and
    processes. In evaluation the student generates too, and the mean is over all tokens. For logs
    and checkpoints see `FDDTrainer`. TRL's metric `entropy` needs logits and is not computed.

    Options of DistillationConfig and the loss:
        beta: refused unless it is TRL's default, which has no effect. The divergence is
            `FDDConfig(output_divergence="jsd:b")`, in TRL's convention.
        temperature: of sampling alone. The loss has `FDDConfig(output_temperature=...)`.
        disable_dropout, use_liger_kernel: as in TRL. Liger replaces modules in the blocks; no loss
            of its own is used. (Liger has not been tried.)
        teacher_model_init_kwargs, teacher_model_revision: refused: the teacher is loaded already.
        teacher_model_server_url: refused: a server gives no hidden states.

    Raises:
        TypeError, ValueError: before any work, an option above; `teacher_model`; a teacher that is
            no model, such as a cache, whose texts are fixed; data without a `prompt`, or with
            images or `token_weights`; and see `FDDTrainer`.
        ValueError: while training, a prompt without a token; fewer prompts than a step takes.
    """

    _config_class = DistillationConfig

    def __init__(
        self,
        model: nn.Module | str,
        teacher: nn.Module | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        sets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for columns in columns_of(sets):
            if columns and "prompt" not in columns:
                raise ValueError(
                    f"the data has {', '.join(columns)}, but no prompt: FDDDistillationTrainer "
                    "generates answers to its column 'prompt', a text or a list of messages"
                )
        super().__init__(model, teacher, args, sets, options)

    def _get_train_sampler(self, *args, **kwargs):
        """As TRL, but each epoch's order follows from its number, so that a resumed training has
        the same.

        Raises:
            ValueError: there are fewer prompts than a step takes; TRL would take no step.
        """
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not len(sampler):
            raise ValueError(
                f"the data has {sampler.num_samples} prompts, but a step takes "
                f"{sampler.batch_size} (per_device_train_batch_size * gradient_accumulation_steps "
                "* processes): lower one of them, or give more prompts"
            )
        if self.shuffle_dataset:
            seed, generator = self.args.seed, sampler.generator
            sampler.set_epoch = lambda epoch: generator.manual_seed(seed + epoch)
        return sampler

    def _generate_single_turn(self, prompt_ids: list, *args, **kwargs) -> list[list[int]]:
        """As TRL, but with a token in every completion: TRL looks at the last one of each.

        Raises:
            ValueError: a prompt without a token, which nothing can be generated from.
        """
        if not all(len(ids) for ids in prompt_ids):
            raise ValueError(
                "a prompt has no token: remove empty prompts from the data, or give a tokenizer "
                "that adds a begin token"
            )
        completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.tools:
            return completions
        self._is_empty = torch.tensor([not ids for ids in completions])
        return [ids or [self._tokenizer.pad_token_id] for ids in completions]

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        """As TRL, but count tokens of completions that have some."""
        made = super()._generate_and_score_completions(inputs)
        if not self.tools:
            made["completion_mask"][self._is_empty.to(made["completion_mask"].device)] = 0
        made["num_items_in_batch"] = self.accelerator.reduce(_generated(made).sum(), "sum")
        return made

    def _prepare_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """Return one micro-batch of generated text, as a `Distiller` takes it, and the number of
        generated tokens in the whole step.
        """
        made = super()._prepare_inputs(inputs)
        if "pixel_values" in made:
            raise ValueError("a prompt or a tool gave an image: the FDD loss is of texts alone")
        parts = made["prompt_ids"], made["completion_ids"]
        answered = parts[1].masked_fill(_generated(made) == 0, IGNORED)
        batch = {
            "input_ids": torch.cat(parts, dim=1),
            "attention_mask": torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1),
            "labels": torch.cat([torch.full_like(parts[0], IGNORED), answered], dim=1),
        }
        return pad_right(batch) | {"num_items_in_batch": made["num_items_in_batch"]}

    def _count(self, batches: list) -> Tensor:
        """Return 1: the data has prompts alone, and what counts is known after generation."""
        return torch.ones((), dtype=torch.int64)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `FDDTrainer`; in training the denominator is the number of generated tokens."""
        if model.training:
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class FDDGKDTrainer(_OnPolicyMixin, GKDTrainer):
    """A `trl.experimental.gkd.GKDTrainer` whose loss is Feature Dynamics Distillation from
    `teacher`, on generated answers or on those of the data.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, **options: as for GKDTrainer;
            `model` is the student, `args` a GKDConfig.
        teacher: a transformers causal LM, given once, in place of TRL's `teacher_model`; otherwise
            as for `FDDTrainer`. TRL wants a vocabulary of the student's size.
        fdd_config: layers and loss options.

    TRL's, unchanged: a micro-batch has answers of the student with probability `lmbda`, otherwise
    those of the data or, with `seq_kd`, the teacher's. The loss is computed at the positions that
    predict a token of the answer; each sequence begins at position 0, as in generation.

    The loss of an optimizer step is the mean over the tokens of the answers that were used, of all
    micro-batches and processes: each micro-batch generates for itself, so the gradient is scaled
    once after the last. Evaluation uses the answers of the data. For logs and checkpoints see
    `FDDTrainer`.

    Options of GKDConfig and the loss:
        beta: refused unless it is TRL's default, which has no effect. The divergence is
            `FDDConfig(output_divergence="jsd:b")`, in TRL's convention.
        temperature: of sampling alone, as in TRL. The loss has
            `FDDConfig(output_temperature=...)`.
        disable_dropout, router_aux_loss_coef, use_liger_kernel: as in `FDDSFTTrainer`. (Liger has
            not been tried.)
        loss_type, packing, eval_packing, padding_free, assistant_only_loss, completion_only_loss:
            refused where they would change the loss: GKDTrainer leaves them out.
        teacher_model_init_kwargs: refused: the teacher is loaded already.
        deepspeed: refused: it holds the gradients, which have to be scaled.

    Raises:
        TypeError, ValueError: before any work, an option above; `teacher_model`; a teacher that is
            no model, such as a cache, whose texts are fixed; data without chats; data with images
            or `token_weights`; and see `FDDTrainer`.
    """

    _config_class = GKDConfig
    _fixed = SFT_OPTIONS
    _generates_with_teacher = True  # with `seq_kd`

    def __init__(
        self,
        model: nn.Module | str | None = None,
        teacher: nn.Module | None = None,
        args: GKDConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(
                "FDDGKDTrainer scales the gradient after the last micro-batch of a step, and "
                "DeepSpeed holds it: use DistributedDataParallel or FSDP2, or "
                "FDDDistillationTrainer, which generates for a whole step"
            )
        sets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for columns in columns_of(sets) if data_collator is None else ():
            is_prepared = "input_ids" in columns and "prompt" in columns
            if columns and not is_prepared and "messages" not in columns:
                raise ValueError(
                    f"the data has {', '.join(columns)}, but no messages: GKDTrainer takes chats "
                    "in a column 'messages', or 'input_ids' beside 'prompt', or a data_collator"
                )
        super().__init__(model, teacher, args, sets, {"data_collator": data_collator, **options})

    def _prepare_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """Return the answers that the step uses, as a `Distiller` takes them."""
        made = super()._prepare_inputs(inputs)
        return pad_right({name: made[name] for name in ("input_ids", "attention_mask", "labels")})


def pad_right(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the padding of every row behind its tokens, and cut columns of padding alone.

    TRL pads prompts on the left. A model without `position_ids` would count that padding, and a
    recurrent one would run over it, which generation did not.

    Args:
        batch: tensors (batch, sequence), `attention_mask` among them.
    """
    attended = batch["attention_mask"] != 0
    order = attended.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    order = order[:, : max(int(attended.sum(1).max()), 1)]
    return {name: tensor.gather(1, order) for name, tensor in batch.items()}


def _generated(made: Mapping[str, Tensor]) -> Tensor:
    """Return where a completion's token is the student's own, int (batch, tokens)."""
    mask = made["completion_mask"]
    return mask * made["tool_mask"] if "tool_mask" in made else mask
