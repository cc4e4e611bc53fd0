"""Loading what a distillation needs, with errors of one line; code that comes with a model is never
run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fdd_kernels.cli.vocabulary import Vocabulary, shared_vocabulary
from fdd_kernels.common.errors import UserError
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.teacher_cache import WindowCache, open_teacher_cache

WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
DEFAULT_LENGTH = 512


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn what loading raises into one line."""
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def load_model(name: str, role: str, **options) -> nn.Module:
    """A causal LM in evaluation mode, from a directory or a name; code that came with it is never
    run.

    Args:
        options: of `from_pretrained`.

    Raises:
        UserError: it cannot be loaded; says why in one line.
    """
    _require_directory(name, role)
    with as_user_error(f"cannot load the {role} {name}"):
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options).eval()


def _require_directory(name: str, role: str) -> None:
    """A path must exist; anything else is the name of a model."""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"the {role} {name}: no such directory")


def load_student(name: str) -> tuple[nn.Module, bool]:
    """The student in float32, and whether it was initialised at random for want of weights."""
    folder = Path(name)
    bare = (folder / "config.json").exists() and not any(
        any(folder.glob(pattern)) for pattern in WEIGHTS
    )
    if not bare:
        return load_model(name, "student").float(), False
    with as_user_error(f"cannot build the student from {folder / 'config.json'}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False
        ).float().eval(), True


def load_vocabulary(
    teacher: str, student: str | None = None, vocab_size: int | None = None
) -> Vocabulary:
    """The tokenizer for both models, the student's if it has one, else the teacher's, and which
    tokens they share.

    Args:
        vocab_size: how many tokens are compared, if not all that they share.

    Raises:
        UserError: there is none, or they differ in more than the tokens at their ends; see
            `shared_vocabulary`.
    """

    def load(name: str, role: str):
        _require_directory(name, role)
        with as_user_error(f"cannot load the tokenizer of the {role} {name}"):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    def has_none(name: str) -> bool:
        return Path(name).is_dir() and not any(
            (Path(name) / file).exists() for file in TOKENIZER_FILES
        )

    if has_none(teacher):
        raise UserError(
            f"the teacher {teacher} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)})"
        )
    theirs = load(teacher, "teacher")
    ours = theirs if student is None or has_none(student) else load(student, "student")
    return shared_vocabulary(ours, theirs, vocab_size)


def open_cache(path: Path) -> WindowCache:
    """A complete teacher cache.

    Raises:
        UserError: there is none, it is not complete, or damaged; says why in one line.
    """
    with as_user_error("the cache cannot be used"):
        return open_teacher_cache(path)


def embeddings(model: nn.Module) -> int:
    """How many tokens a model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]


def fit_vocabularies(config: FDDConfig, rows: dict[str, int], vocabulary: Vocabulary) -> FDDConfig:
    """Compare the shared tokens only, where the heads of "student" and "teacher" or their
    tokenizers are unequal.

    Args:
        rows: how many tokens each model has embeddings for.

    Raises:
        UserError: a model has too few for the tokenizer, or more tokens are to be compared than are
            shared.
    """
    for role, count in rows.items():
        if vocabulary.size > count:
            raise UserError(
                f"the tokenizer has {vocabulary.size} tokens, but the {role} only {count} "
                "embeddings"
            )
    if vocabulary.partial and (config.vocab_size or 0) > vocabulary.size:
        raise UserError(
            f"vocab_size={config.vocab_size}, but the models share the first {vocabulary.size} "
            "tokens only"
        )
    if config.vocab_size is None and (vocabulary.partial or len(set(rows.values())) > 1):
        return dataclasses.replace(config, vocab_size=vocabulary.size)
    return config


def require_shared(cache: WindowCache, vocabulary: Vocabulary) -> None:
    """Raise UserError if the windows of a cache hold a token that the student does not share with
    the teacher.
    """
    tokens = torch.tensor(sorted(vocabulary.unshared), dtype=cache.table.input_ids.dtype)
    found = cache.table.input_ids[torch.isin(cache.table.input_ids, tokens)]
    if len(found):
        raise UserError(
            f"the cached text of {cache.path} holds {len(found)} tokens that student and teacher "
            "do not share, the first is "
            f"{int(found[0])}: cache the teacher over text without them"
        )


def window_length(wanted: int | None, **models: nn.Module) -> int:
    """How many tokens a window may have: `wanted`, or as many as the models named have positions
    for, at most 512.

    Raises:
        UserError: a model has fewer than `wanted`.
    """
    limits = {}
    for role, model in models.items():
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            limits[role] = positions
    shortest = min(limits, key=limits.get, default=None)
    if wanted is None:
        return min(DEFAULT_LENGTH, *limits.values()) if limits else DEFAULT_LENGTH
    if shortest is not None and wanted > limits[shortest]:
        raise UserError(
            f"max_length={wanted}, but the {shortest} has only {limits[shortest]} positions"
        )
    return wanted


def computing_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported()
            else torch.float32
        )
    return getattr(torch, name)


def with_lora(
    student: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ("all-linear",),
) -> nn.Module:
    """The student with adapters of this rank on the modules named; `alpha` is twice the rank unless
    given.

    Raises:
        UserError: peft is not installed, or there are no such modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("--lora-rank needs peft: pip install peft") from None
    targets = targets[0] if len(targets) == 1 and targets[0] == "all-linear" else list(targets)
    with as_user_error("cannot add LoRA adapters to the student"), warnings.catch_warnings():
        # peft asks for transformers' property by its old name.
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )
        config = LoraConfig(
            r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, task_type="CAUSAL_LM"
        )
        return get_peft_model(student, config)
