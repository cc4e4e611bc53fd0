"""Metrics of an evaluation with a teacher cache: those that it holds enough for."""

import math

import pytest
import torch

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.data import pad_windows
from fdd_kernels.integrations.streamed_metrics import watching
from fdd_kernels.teacher_cache import write_summary_cache
from tests.support.cache_inputs import LAYERS, student_model, teacher_model, write
from tests.support.dense_metrics import dense_metrics, layer_logits
from tests.support.hf_models import tiny_tokenizer

OF_LABELS = {"perplexity", "accuracy"}
OF_OUTPUT = {"kl", "agreement"}


def metrics_and_batch(cache, config):
    held_out = cache.dataset("held_out")
    batch = pad_windows([held_out[index] for index in range(3)])
    with torch.no_grad(), watching(Distiller(student_model(), cache, config)) as metrics:
        metrics._distiller(batch)
    return metrics.results(lambda tensor, _: tensor), batch


def test_states(windows, tmp_path):
    """Also for a loss of the output alone, as far as the cache has the teacher's layers."""
    cache, found = write(tmp_path / "cache", windows), {}
    for name, layers in (("held", LAYERS), ("not held", (1, 2, 3))):
        config = FDDConfig.paper(
            student_layers=(1, 2, 3), teacher_layers=layers, alpha=0.0, beta=0.0
        )
        found[name], batch = metrics_and_batch(cache, config)
    of_layers = {f"kl_layer_{k}" for k in (1, 2, 3)}
    assert found["held"].keys() == OF_LABELS | OF_OUTPUT | of_layers
    assert found["not held"].keys() == OF_LABELS | OF_OUTPUT
    models = student_model(), teacher_model()
    logits = [layer_logits(m, batch, k) for m, k in zip(models, ((1, 2, 3), LAYERS))]
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = dense_metrics(*logits, labels, (1, 2, 3))
    means = {name: float(value[labels != -100].mean()) for name, value in expected.items()}
    means["perplexity"] = math.exp(means.pop("nll"))
    for name, value in found["held"].items():
        assert value == pytest.approx(means[name], rel=1e-4), name  # the cache is in float32
    for name, value in found["not held"].items():
        assert value == pytest.approx(found["held"][name], rel=1e-6), name


def test_a_summary_has_no_head_to_compare_with(windows, tmp_path):
    student = student_model()
    cache = write_summary_cache(
        tmp_path / "cache",
        teacher_model(),
        student,
        windows,
        layers=LAYERS,
        tokenizer=tiny_tokenizer(),
    )
    config = FDDConfig.paper(
        student_layers=(1, 2, 3), teacher_layers=LAYERS, ce_weight=0.5, train_head=False
    )
    found, batch = metrics_and_batch(cache, config)
    assert found.keys() == OF_LABELS
    with torch.no_grad():
        loss = Distiller(student, teacher_model(), config)(batch).ce
    assert found["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
