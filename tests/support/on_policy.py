"""Tiny trainers that generate, what they generated, and the loss of it in a plain loop."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig
from trl.experimental.gkd import GKDConfig

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.integrations import FDDDistillationTrainer, FDDGKDTrainer
from tests.support.dense import dense_terms, gradients
from tests.support.hf_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONFIG = FDDConfig.paper(num_layers=2, ce_weight=0.5, alpha=0.7, beta=1.3)
QUESTIONS = ["one two", "three four word words the and a is", "the", "words " * 7]
PROMPTS = [{"prompt": text} for text in QUESTIONS * 2]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "four " * (1 + n % 5)},
        ]
    }
    for n, text in enumerate(QUESTIONS * 2)
]
_QUIET = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "bf16": False,
    "seed": 3,
    "max_grad_norm": 0.0,
    "learning_rate": 1e-2,
}


def student_model(dtype=torch.float64):
    """Many of its tokens end a completion, so that lengths differ. (Generation in float64 with
    eager attention gives NaN behind padding.)
    """
    model = tiny_model("llama", depth=3, seed=1, vocab_size=len(TOKENIZER), dtype=dtype)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = list(range(60))
    return model


def teacher_model(dtype=torch.float64):
    """Absolute positions: padding before a sequence would change them."""
    return tiny_model("gpt2", depth=3, seed=2, vocab_size=len(TOKENIZER), dtype=dtype)


class Gradients(TrainerCallback):
    """The student's gradients before each optimizer step."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found.append({name.removeprefix("module."): g for name, g in gradients(model).items()})


class Sampling(FDDDistillationTrainer):
    """Records what was generated, as lists of tokens: (prompt, completion)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.texts, self.evaluated = [], []

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        made = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        texts = self.texts if self.model.training else self.evaluated
        texts.extend(zip(prompt_ids, made, strict=True))
        return made


class Answering(FDDGKDTrainer):
    """Records the answers that were used, and for how many batches it generated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.texts, self.evaluated, self.generated = [], [], 0

    def _prepare_inputs(self, inputs):
        texts = self.texts if self.model.training else self.evaluated
        names = ("input_ids", "attention_mask", "labels")
        for ids, mask, labels in zip(*(inputs[name] for name in names)):
            tokens, answer = ids[mask == 1].tolist(), int((labels != -100).sum())
            texts.append((tokens[:-answer], tokens[-answer:]))
        return super()._prepare_inputs(inputs)

    def generate_on_policy_outputs(self, *args):
        self.generated += 1
        return FDDGKDTrainer.generate_on_policy_outputs(*args)


def _make(kind, config_class, output, rows, data, config, defaults, arguments):
    names = ("callbacks", "peft_config", "eval_dataset", "teacher_model")
    more = {name: arguments.pop(name) for name in names if name in arguments}
    models = [
        arguments.pop(name, None) or make()
        for name, make in (("student", student_model), ("teacher", teacher_model))
    ]
    config_class = arguments.pop("config_class", config_class)
    return kind(
        *models,
        config_class(output_dir=str(output), **(_QUIET | defaults | arguments)),
        train_dataset=Dataset.from_list(data if rows is None else rows),
        fdd_config=config,
        processing_class=TOKENIZER,
        **more,
    )


def sampling(output, rows=None, *, config=CONFIG, **arguments):
    """Make an FDDDistillationTrainer on `rows` with prompts."""
    defaults = {"max_completion_length": 6}
    return _make(Sampling, DistillationConfig, output, rows, PROMPTS, config, defaults, arguments)


def answering(output, rows=None, *, config=CONFIG, **arguments):
    """Make an FDDGKDTrainer on `rows` with chats."""
    defaults = {"max_new_tokens": 6, "max_length": 48}
    return _make(Answering, GKDConfig, output, rows, CHATS, config, defaults, arguments)


def sequence(prompt, completion):
    """A batch of one sequence without padding."""
    ids = torch.tensor([[*prompt, *completion]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def mean_terms(texts, student, teacher, *, dense=False):
    """Return the terms of single sequences by name, as means over all generated tokens.

    Args:
        texts: (prompt, completion) as lists of tokens.
        dense: take the dense formula instead of a Distiller.
    """
    tokens = sum(len(completion) for _, completion in texts)
    distiller, means = Distiller(student, teacher, CONFIG), {}
    for prompt, completion in texts:
        batch = sequence(prompt, completion)
        terms = (
            dense_terms(student, teacher, batch, CONFIG, (1, 2), (1, 2))
            if dense
            else distiller(batch)
        )
        for name, term in terms._asdict().items():
            means[name] = means.get(name, 0.0) + len(completion) / tokens * term
    return means


def require_plain_loop(texts, log, gradient, *, dense=False):
    """Compare a step's logged terms and gradients with a plain loop on what it generated.

    Float32 norms inside float64 models (Llama's) round at 6e-8, alike on both sides but for the
    shape of the batch; so do denominators, which GKDTrainer's scale replaces, and logged losses.
    """
    assert len({len(completion) for _, completion in texts}) > 1
    student = student_model().train()
    terms = mean_terms(texts, student, teacher_model(), dense=dense)
    for name, value in terms.items():
        assert abs(log[name] - float(value)) <= 1e-6 * abs(float(value)), name
    terms["loss"].backward()
    expected = gradients(student)
    assert gradient.keys() == expected.keys()
    for name, g in expected.items():
        bound = 1e-6 * float(g.abs().max())
        torch.testing.assert_close(gradient[name], g, rtol=0, atol=bound, msg=name)
