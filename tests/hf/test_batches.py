"""Errors of batches, models and configs that cannot be distilled name argument, value and
remedy.
"""

import pytest
import torch

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.integrations import FDDTrainer
from tests.support.hf_models import tiny_batch, tiny_model

SHARED = 90


@pytest.fixture(scope="module")
def distiller():
    """A teacher with fewer tokens than its student, and 64 learned positions."""
    student, teacher = (
        tiny_model("llama", depth=5, seed=1),
        tiny_model("gpt2", depth=5, vocab_size=SHARED, seed=2),
    )
    return Distiller(student, teacher, FDDConfig.paper(vocab_size=SHARED))


def batch(**changes):
    return tiny_batch(vocab_size=SHARED) | changes


@pytest.mark.parametrize("token", [SHARED, -1])
def test_a_token_that_a_model_does_not_have_is_named(distiller, token):
    ids = batch()["input_ids"]
    ids[1, 2] = token
    with pytest.raises(
        ValueError, match=rf"input_ids contains {token}, .*the teacher has embeddings .* \[0, 90\)"
    ):
        distiller(batch(input_ids=ids))


def test_more_tokens_than_positions_are_counted(distiller):
    with pytest.raises(ValueError, match="70 tokens a row, but the teacher has only 64 positions"):
        distiller({"input_ids": torch.ones(1, 70, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"labels": torch.ones(2, 7, dtype=torch.int64)},
            ValueError,
            r"labels has shape \(2, 7\), but input_ids is of \(2, 9\)",
        ),
        (
            {"attention_mask": torch.ones(2, 7)},
            ValueError,
            r"attention_mask has shape \(2, 7\), but input_ids is of \(2, 9\)",
        ),
        (
            {"input_ids": torch.ones(9, dtype=torch.int64)},
            ValueError,
            r"input_ids has shape \(9,\)",
        ),
        ({"input_ids": [[1, 2]]}, TypeError, r"input_ids is a list, but a tensor .*pad_windows"),
        ({"labels": [[1, 2]]}, TypeError, r"labels is a list"),
        ({"token_weights": [[1.0, 2.0]]}, TypeError, r"token_weights is a list"),
        (
            {"token_weights": torch.ones(2, 8)},
            ValueError,
            r"token_weights has shape \(2, 8\), but input_ids is of \(2, 9\).*not shifted",
        ),
        (
            {"token_weights": torch.ones(2, 9, dtype=torch.int64)},
            TypeError,
            r"token_weights is a int64 tensor.*float32",
        ),
        (
            {"token_weights": torch.full((2, 9), -0.5)},
            ValueError,
            r"token_weights contains -0.5: weights are finite and at least 0",
        ),
        (
            {"token_weights": torch.full((2, 9), torch.nan)},
            ValueError,
            r"token_weights contains nan",
        ),
        (
            {"token_weights": torch.ones(2, 9, requires_grad=True)},
            ValueError,
            r"token_weights requires grad",
        ),
        (
            {"input_ids": None},
            ValueError,
            r"neither input_ids nor inputs_embeds; it has input_ids, attention_mask, labels",
        ),
    ],
)
def test_a_batch_of_another_shape_is_refused(distiller, changes, error, message):
    with pytest.raises(error, match=message):
        distiller(batch(**changes))
    with pytest.raises(error, match=message):  # trainers count positions first
        distiller.count_positions(batch(**changes))


def test_a_tensor_is_no_batch(distiller):
    with pytest.raises(TypeError, match=r"batch must be a mapping .* got Tensor"):
        distiller(batch()["input_ids"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_cache_is_made_whatever_the_batch_says(distiller, use_cache):
    torch.testing.assert_close(
        distiller(batch(use_cache=use_cache)).loss, distiller(batch()).loss, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": "a/student"},
            r"student must be a model, got the string 'a/student': load it first",
        ),
        ({"student": None}, r"student must be a model, got NoneType"),
        (
            {"teacher": "a/teacher"},
            r"teacher must be a model or a teacher cache, got the string 'a/teacher'",
        ),
        ({"config": {"alpha": 1}}, r"config must be an FDDConfig, got dict"),
    ],
)
def test_what_is_no_model_is_named(changes, message):
    model = tiny_model("llama", depth=5)
    with pytest.raises(TypeError, match=message):
        Distiller(**({"student": model, "teacher": model} | changes))


def test_a_string_as_a_trainers_model_is_named():
    with pytest.raises(TypeError, match=r"model must be a model, got the string 'a/student'"):
        FDDTrainer(model="a/student", teacher=tiny_model("llama", depth=5))
