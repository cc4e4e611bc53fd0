"""Load models, tokenizers and caches, with errors of one line. Code that comes with a model is
never run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fdd_kernels.cli.vocabulary import Vocabulary, shared_vocabulary
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.model_tasks import saved_task
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
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn errors of loading into a UserError of one line that begins with `what`."""
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


def make_directory(path: Path) -> None:
    """Make a directory if it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a directory: {error.strerror}") from None


def load_model(name: str, role: str, **options) -> nn.Module:
    """Load a causal LM in evaluation mode from a directory or by a name on the hub.

    Args:
        options: of `from_pretrained`.

    Raises:
        UserError: it cannot be loaded.
    """
    _require_directory(name, role)
    with as_user_error(f"cannot load the {role} {name}"):
        with contextlib.suppress(OSError, ValueError):  # of the model itself, or it has adapters
            _require_causal_lm(AutoConfig.from_pretrained(name, trust_remote_code=False), role)
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options).eval()


def _require_directory(name: str, role: str) -> None:
    """Raise UserError if `name` is written as a path and no such directory exists."""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"the {role} {name}: no such directory")


def _require_causal_lm(config: Any, role: str) -> None:
    """Raise TypeError for the config of a model that was saved for another task."""
    if (task := saved_task(config)) != "causal_lm":
        raise TypeError(
            f"the {role} is of the task {task} ({', '.join(config.architectures or ())}), and the "
            "command line is for causal LMs: use Distiller or FDDTrainer"
        )


def load_student(name: str) -> tuple[nn.Module, bool]:
    """Load the student in float32; a directory without weights gives a random one.

    Returns:
        The model, and whether it was initialised at random.
    """
    folder = Path(name)
    bare = (folder / "config.json").exists() and not any(
        any(folder.glob(pattern)) for pattern in WEIGHTS
    )
    if not bare:
        return load_model(name, "student").float(), False
    with as_user_error(f"cannot build the student from {folder / 'config.json'}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _require_causal_lm(config, "student")
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False
        ).float().eval(), True


def load_vocabulary(
    teacher: str,
    student: str | None = None,
    vocab_size: int | None = None,
    roles: tuple[str, str] = ("student", "teacher"),
) -> Vocabulary:
    """Load the tokenizer for both models and find the tokens they share.

    It is the student's tokenizer if the student has one, else the teacher's.

    Args:
        vocab_size: how many tokens to compare; None: all that both share.
        roles: what student and teacher are called in messages.

    Raises:
        UserError: the teacher has no tokenizer, or the two do not fit; see `shared_vocabulary`.
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
            f"the {roles[1]} {teacher} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)})"
        )
    theirs = load(teacher, roles[1])
    ours = theirs if student is None or has_none(student) else load(student, roles[0])
    return shared_vocabulary(ours, theirs, vocab_size, roles)


def open_cache(path: Path) -> WindowCache:
    """Open a complete teacher cache.

    Raises:
        UserError: there is none, it is not complete, or it is damaged.
    """
    with as_user_error("the cache cannot be used"):
        return open_teacher_cache(path)


def embeddings(model: nn.Module) -> int:
    """The number of tokens a model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]


def fit_vocabularies(config: FDDConfig, rows: dict[str, int], vocabulary: Vocabulary) -> FDDConfig:
    """Set `vocab_size` to the shared tokens if heads or tokenizers differ in size.

    Args:
        rows: the number of embeddings by model, "student" and "teacher".

    Raises:
        UserError: a model has fewer embeddings than the tokenizer has tokens, or `vocab_size` is
            larger than the shared vocabulary.
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
    """Raise UserError if the cached windows hold a token that student and teacher do not share."""
    tokens = torch.tensor(sorted(vocabulary.unshared), dtype=cache.table.input_ids.dtype)
    found = cache.table.input_ids[torch.isin(cache.table.input_ids, tokens)]
    if len(found):
        raise UserError(
            f"the cached text of {cache.path} holds {len(found)} tokens that student and teacher "
            f"do not share, the first is {int(found[0])}: cache the teacher over text without them"
        )


def window_length(wanted: int | None, **models: nn.Module) -> int:
    """Tokens in a window: `wanted`, else 512 or the fewest positions of the models.

    Raises:
        UserError: a model has fewer positions than `wanted`.
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
    """The dtype of that name; "auto" is bfloat16 on a GPU that has it, else float32."""
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
    """Add LoRA adapters to the student.

    Args:
        alpha: None: twice the rank.
        targets: names of modules, or "all-linear".

    Raises:
        UserError: peft is not installed, or no module has such a name.
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
