"""Whole training steps: forward of student and teacher, loss, backward and AdamW, for pairs of real
architectures with random weights. Output KD and FDD, each dense and by this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import dense
from benchmarks.providers import Loss, Provider
from benchmarks.workloads import Workload
from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.hf.layers import paired_layers

SUITE, GROUP = "step", "steps"
TOKENS, QUICK_TOKENS = (128, 512), (16,)
DEFAULT_PAIRS = ("gpt2", "llama")
LAYERS = 5  # of FDD's loss: the paper's four, and the output
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}  # below the vocabulary of the smallest pair
_UNTIED = {"tie_word_embeddings": False} | _TOKENS
# All losses are those of the same states.
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | _TOKENS
KD = {"alpha": 0.0, "beta": 0.0}  # options that leave output KD alone
DERIVATIVE = {"derivative": "cosine"}  # of the published FDD, as `dense.row_losses_of` takes it


@dataclass(frozen=True)
class Pair:
    """Two architectures of one family.

    Attributes:
        family: transformers' model type.
        norm: the name of the norm before the head.
        student, teacher: fields of the models' configs. `shared` are the same in both.
    """

    text: str
    family: str
    norm: str
    vocabulary: int
    student: dict[str, Any]
    teacher: dict[str, Any]
    shared: dict[str, Any]

    @property
    def toy(self) -> Pair:
        """A pair of the same family with tiny sizes."""
        tiny = {"num_key_value_heads": 2, "intermediate_size": 32}
        sizes = [
            _sizes(16, 5, 2, **{n: v for n, v in tiny.items() if n in model})
            for model in (self.student, self.teacher)
        ]
        return replace(self, vocabulary=97, student=sizes[0], teacher=sizes[1])


def _sizes(width: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | more


def gpt2(text: str, vocabulary: int, student: Sequence[int], teacher: Sequence[int]) -> Pair:
    """Make a GPT-2 pair; (width, layers, heads) of each."""
    models = [_sizes(*sizes) for sizes in (student, teacher)]
    return Pair(text, "gpt2", "transformer.ln_f", vocabulary, *models, _NO_DROPOUT)


def llama(text: str, vocabulary: int, student: Sequence[int], teacher: Sequence[int]) -> Pair:
    """Make a Llama pair; (width, layers, heads, key-value heads, width of the MLP) of each."""
    models = [
        _sizes(*sizes[:3], num_key_value_heads=sizes[3], intermediate_size=sizes[4])
        for sizes in (student, teacher)
    ]
    return Pair(text, "llama", "model.norm", vocabulary, *models, _UNTIED)


_CUT = "Llama with TinyLlama's widths and 8 of its 22 layers to half its width and 6 layers"
PAIRS = {
    "gpt2": gpt2("GPT-2 medium to GPT-2", 50257, (768, 12, 12), (1024, 24, 16)),
    "llama": llama(_CUT, 32000, (1024, 6, 16, 4, 2816), (2048, 8, 32, 4, 5632)),
    "tiny": gpt2("GPT-2 of toy size, for tests", 97, (16, 5, 2), (24, 10, 2)),
}


def workloads(pairs: Sequence[str], tokens: Sequence[int], dtypes: Sequence[str]) -> list[Workload]:
    """List the training steps of these pairs, each with one sequence of so many tokens.

    The last token has no next one, so the loss has a row less.

    Raises:
        ValueError: an unknown pair or dtype, or fewer than 2 tokens.
    """
    for name in pairs:
        if name not in PAIRS:
            raise ValueError(f"unknown pair {name!r}: choose from {', '.join(PAIRS)}")
    for number in tokens:
        if number < 2:
            raise ValueError(f"--tokens {number} must be at least 2: the first predicts the second")
    return [
        Workload(
            f"{name}-{number}-{dtype}",
            PAIRS[name].text,
            rows=number - 1,
            columns=PAIRS[name].vocabulary,
            student_width=PAIRS[name].student["hidden_size"],
            teacher_width=PAIRS[name].teacher["hidden_size"],
            layers=LAYERS,
            dtype=dtype,
            pair=name,
            group=GROUP,
            measures=("time", "memory"),
        )
        for dtype in dtypes
        for name in pairs
        for number in tokens
    ]


class Models:
    """Both models of a pair, a batch, and the optimizer of the student.

    The weights and the batch are the same whenever they are made anew.

    Args:
        shape: sequences and tokens of the batch.
        backend: of this package.
    """

    def __init__(
        self,
        pair: Pair,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        backend: str = "auto",
    ) -> None:
        self.pair, self.backend = pair, backend
        torch.manual_seed(0)
        self.student = _model(pair, pair.student, shape[1]).to(device, dtype).train()
        self.teacher = _model(pair, pair.teacher, shape[1]).to(device, dtype).eval()
        self.teacher.requires_grad_(False)
        tokens = torch.randint(pair.vocabulary, shape).to(device)
        self.batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        self.batch["labels"] = tokens
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)
        self._distillers: dict[str, Distiller] = {}

    @property
    def weight_bytes(self) -> int:
        """Count the bytes of both models' weights."""
        return sum(p.nbytes for m in (self.student, self.teacher) for p in m.parameters())

    @property
    def optimizer_bytes(self) -> int:
        """Count the bytes of the optimizer's state."""
        states = self.optimizer.state.values()
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))

    def train(self, loss_of: Callable[[], Tensor]) -> Tensor:
        """Take one step of the optimizer; returns the loss before it."""
        loss = loss_of()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def distiller(self, options: dict[str, Any]) -> Distiller:
        """Return the distiller of the published FDD with these options, made at its first use."""
        key = repr(sorted(options.items()))
        if key not in self._distillers:
            config = FDDConfig.paper(**options, backend=self.backend)
            self._distillers[key] = Distiller(self.student, self.teacher, config)
        return self._distillers[key]

    def _run(self, model: nn.Module, *, hidden: bool) -> tuple[nn.Module, Any]:
        """Run a model on the batch: its final norm, and its output, with states if `hidden`."""
        inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
        output = model(**inputs, output_hidden_states=hidden, use_cache=False)
        return model.get_submodule(self.pair.norm), output

    def log_probabilities(self, model: nn.Module, layers: Sequence[int]) -> list[Tensor]:
        """Compute log-probabilities of the tokens that have a next one, (R, V) each: after so many
        blocks through final norm and head, then those of the model's own logits.
        """
        norm, found = self._run(model, hidden=bool(layers))
        head = model.get_output_embeddings().weight
        states = [found.hidden_states[layer][:, :-1] for layer in layers]
        lens = [dense.log_probabilities(norm(h).flatten(0, 1), head) for h in states]
        logits = found.logits[:, :-1].flatten(0, 1)
        return [*lens, F.log_softmax(logits, -1, dtype=torch.float32)]

    @torch.no_grad()
    def head_inputs(self, options: dict[str, Any], count: int) -> list[tuple[Tensor, ...]]:
        """Return of student and teacher the states that the loss multiplies by their heads, at
        `count` tokens that have a next one, (count, D) each.
        """
        found = []
        for model, layers in zip((self.student, self.teacher), self.layers(options)):
            norm, output = self._run(model, hidden=True)
            states = output.hidden_states
            rows = torch.linspace(0, self.batch["labels"].shape[1] - 2, count).long().unique()
            # The last of transformers' states is normed already.
            normed = [*[norm(states[layer]) for layer in layers], states[-1]]
            found.append(tuple([h[0, rows] for h in normed]))
        return found

    def layers(self, options: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the paper's layers of student and teacher; none for output KD alone."""
        if options == KD:
            return (), ()
        depths = [m.config.num_hidden_layers for m in (self.student, self.teacher)]
        return paired_layers(FDDConfig.paper(), *depths)


def _model(pair: Pair, sizes: dict[str, Any], tokens: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    about = {"vocab_size": pair.vocabulary, "max_position_embeddings": max(1024, tokens)}
    config = AutoConfig.for_model(pair.family, **about, **sizes, **pair.shared)
    return AutoModelForCausalLM.from_config(config)


def of_workload(workload: Workload, device: torch.device) -> Models:
    """Make the models of a workload."""
    shape, dtype = (1, workload.rows + 1), getattr(torch, workload.dtype)
    return Models(PAIRS[workload.pair], shape, dtype, device)


def dense_loss(models: Models, options: dict[str, Any]) -> Tensor:
    """Compute the loss as training code writes it in plain PyTorch, with logits of all tokens."""
    of_student, of_teacher = models.layers(options)
    student = models.log_probabilities(models.student, of_student)
    with torch.no_grad():
        teacher = models.log_probabilities(models.teacher, of_teacher)
    return dense.row_losses_of(student, teacher, DERIVATIVE).mean()


def fused_loss(models: Models, options: dict[str, Any]) -> Tensor:
    """Compute the same by this package."""
    return models.distiller(options)(models.batch).loss


def loss_options(models: Models, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `fused_fdd_loss` for the same loss."""
    found = models.distiller(options).options
    return {f.name: getattr(found, f.name) for f in fields(found)}


def _loss(name: str, title: str, color: str, loss: Loss, drops: dict[str, Any]) -> Provider:
    ours = loss is fused_loss
    about = {"package": "fdd_kernels" if ours else "torch", "module": "transformers"}
    kind = "backends" if ours else "pytorch"
    return Provider(name, title, kind, color, loss, computes=title, drops=drops, **about)


_ALL = (
    _loss("kd-dense", "output KD, dense", "#adb5bd", dense_loss, KD),
    _loss("kd-ours", "output KD, ours", "#f4a3a8", fused_loss, KD),
    _loss("fdd-dense", "FDD, dense", "#6c757d", dense_loss, {}),
    _loss("fdd-ours", "FDD, ours", "#d1495b", fused_loss, {}),
)
LOSSES: dict[str, Provider] = {provider.name: provider for provider in _ALL}
