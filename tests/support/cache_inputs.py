"""Windows, a teacher, its caches and a student for the tests of the teacher cache."""

import torch

from fdd_kernels import FDDConfig
from fdd_kernels.data import pad_windows
from fdd_kernels.teacher_cache import write_teacher_cache
from tests.support.hf_models import tiny_model, tiny_tokenizer

LAYERS = (1, 2, 4)
CONFIG = FDDConfig.paper(student_layers=(1, 2, 3), teacher_layers=LAYERS, ce_weight=0.5)
VOCAB = len(tiny_tokenizer())
CHAT = [
    {"role": "user", "content": "one and two"},
    {"role": "assistant", "content": "three is the word"},
]


def teacher_model(family="gpt2", **changes):
    return tiny_model(family, depth=5, vocab_size=VOCAB, seed=2, spread=2.0, **changes)


def student_model(**changes):
    return tiny_model("llama", depth=4, vocab_size=VOCAB, seed=1, **changes)


def write(folder, windows, teacher=None, **changes):
    defaults = {
        "layers": LAYERS,
        "codec": "float32",
        "batch_size": 4,
        "shard_size": 20_000,
        "tokenizer": tiny_tokenizer(),
    }
    return write_teacher_cache(folder, teacher or teacher_model(), windows, **(defaults | changes))


def batch_of(cache, rows=5, start=0):
    """A batch from the middle of the training windows, in another order than they were cached."""
    dataset = cache.dataset("train")
    return pad_windows([dataset[(start + 3 * row) % len(dataset)] for row in range(rows)])


def weighted(batch):
    """The batch with weights of its positions; some are 0."""
    shape = batch["input_ids"].shape
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(5))
    return batch | {"token_weights": weights.masked_fill(weights < 0.2, 0.0)}


def valid_rows(batch):
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = batch["labels"][:, 1:] != -100
    return mask & batch["attention_mask"].bool()


def loss_and_gradients(student, distiller, batch, **options):
    student.zero_grad()
    terms = distiller(batch, **options)
    terms.loss.backward()
    return terms, {name: p.grad.clone() for name, p in student.named_parameters()}


def same_loss_and_gradients(student, distiller, live, batch, **live_options):
    """Two distillers of one student, up to rounding in float32."""
    terms, gradients = loss_and_gradients(student, distiller, batch)
    expected_terms, expected = loss_and_gradients(student, live, batch, **live_options)
    for name, term, value in zip(terms._fields, terms, expected_terms):
        # Two evaluations with up to 9 x 97 addends in another order, each rounded by half a unit in
        # either.
        torch.testing.assert_close(
            term, value, rtol=873 * 2.0**-23, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            expected[name],
            rtol=1e-4,
            atol=1e-5 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    return expected_terms


def digests(folder):
    """Content of everything in a cache."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
