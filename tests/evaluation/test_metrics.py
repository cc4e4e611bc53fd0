"""The metrics of an evaluation against dense float64 formulas, alone and inside FDDTrainer."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.evaluation.metrics import bits_per_byte, perplexity, sequence_sums, token_metrics
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.integrations.streamed_metrics import watching
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.inputs import LossInputs
from tests.support.dense_metrics import dense_metrics, layer_logits, logits_of_inputs
from tests.support.hf_models import tiny_model
from tests.support.tasks import batch_of, logits_of_layers, pair
from tests.support.training import examples, pad

F64 = torch.float64
# Sums over at most 101 tokens of terms that are exact to a few roundings.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def random_inputs(*, layers=2, bias=True, softcap=False) -> tuple[LossInputs, LossOptions]:
    """Two sequences of five positions, of which some are not valid, in float64."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    labels = torch.randint(0, 101, (2, 5), generator=generator)
    labels[0, 3] = -100
    mask = labels != -100
    mask[1, 4] = False
    inputs = LossInputs(
        [draw(2, 5, 8) for _ in range(layers + 1)],
        draw(101, 8),
        [draw(2, 5, 12) for _ in range(layers + 1)],
        draw(101, 12),
        labels,
        student_bias=draw(101) if bias else None,
        teacher_bias=draw(101) if bias else None,
        mask=mask,
    )
    options = {"student_softcap": 3.0, "teacher_softcap": 2.0, "student_logit_scale": 0.5}
    return inputs, LossOptions(**options) if softcap else LossOptions()


@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("vocab_size", [None, 60])
def test_every_metric_of_every_position(softcap, vocab_size):
    inputs, options = random_inputs(softcap=softcap)
    options = replace(options, vocab_size=vocab_size)
    found = token_metrics(inputs, options, (2, 5))
    z_s, z_t = logits_of_inputs(inputs, options)
    expected = dense_metrics(z_s, z_t, inputs.labels, (2, 5), vocab_size)
    assert found.keys() == expected.keys()
    assert (expected["nll"][inputs.labels >= 60] > 0).any()  # over all tokens, not the first 60
    for name, value in expected.items():
        value = torch.where(inputs.mask, value, 0.0)
        torch.testing.assert_close(found[name].double(), value, **EXACT, msg=name)


def test_of_equal_largest_logits_the_first_counts():
    inputs, options = random_inputs(layers=0, bias=False)
    weight = torch.zeros(101, 8, dtype=F64)
    weight[7] = weight[30] = 1.0
    state = torch.ones(2, 5, 8, dtype=F64)
    labels = torch.tensor([[7, 30, 7, 30, 1]] * 2)
    inputs = replace(inputs, student_hidden=[state], student_weight=weight, labels=labels)
    inputs = replace(inputs, mask=torch.ones_like(labels))
    found = token_metrics(inputs, options)["accuracy"]
    assert found.tolist() == [[True, False, True, False, False]] * 2


def test_sums_of_sequences_are_weighted():
    inputs, options = random_inputs(layers=1)
    weights = torch.tensor([[0.5, 2.0, 1.0, 7.0, 0.0], [1.0, 0.25, 0.0, 3.0, 9.0]])
    inputs = replace(inputs, token_weights=weights)
    # The label of a position of weight 0 cannot occur: its loss is infinite.
    bias = inputs.student_bias.clone()
    bias[inputs.labels[1, 2]] = -math.inf
    bias[inputs.labels[0, 4]] = -math.inf
    inputs = replace(inputs, student_bias=bias, teacher_bias=torch.where(bias.isinf(), bias, 0.0))
    found = sequence_sums(inputs, options, (1,))
    used = torch.where(inputs.mask, weights.double(), 0.0)
    torch.testing.assert_close(found.weight, used.sum(-1), rtol=0, atol=0)
    for name, value in token_metrics(inputs, options, (1,)).items():
        expected = torch.where(used > 0, value.double() * used, 0.0).sum(-1)
        assert expected.isfinite().all()
        torch.testing.assert_close(found.sums[name], expected, **EXACT, msg=name)


def test_without_labels_or_a_teacher():
    inputs, options = random_inputs()
    unlabelled = token_metrics(replace(inputs, labels=None), options, (1, 2))
    assert unlabelled.keys() == {"kl", "agreement", "kl_layer_1", "kl_layer_2"}
    alone = replace(inputs, teacher_hidden=(), teacher_weight=None, teacher_bias=None)
    found, both = token_metrics(alone, options), token_metrics(inputs, options, (1, 2))
    assert found.keys() == {"nll", "accuracy"}
    for name, value in found.items():
        torch.testing.assert_close(value, both[name], **EXACT)
    assert token_metrics(replace(alone, labels=None), options) == {}


def test_formulas_of_means():
    assert perplexity(math.log(7.0)) == pytest.approx(7.0, rel=1e-15)
    assert perplexity(1e4) == math.inf
    assert bits_per_byte(8 * math.log(2.0), 4) == pytest.approx(2.0, rel=1e-15)


@pytest.fixture(scope="module")
def models():
    """Student and teacher that compute everything in float64 (Llama's norm does not)."""
    student = tiny_model("gpt2", depth=3, seed=1, n_embd=16, dtype=F64)
    return student, tiny_model("gpt2", depth=3, seed=2, dtype=F64)


ROWS = examples([9, 4, 17, 6, 12])


def expected_means(models, rows, layers, weights=None) -> dict[str, float]:
    """The metrics from the models' own logits and hidden states."""
    batch = pad(rows)
    logits = [layer_logits(model, batch, layers) for model in models]
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    valid = ((labels != -100) & (batch["attention_mask"] != 0)).double()
    valid = valid if weights is None else valid * weights
    found = dense_metrics(*logits, labels, layers)
    means = {name: float((value * valid).sum() / valid.sum()) for name, value in found.items()}
    return {"perplexity": math.exp(means.pop("nll")), **means}


def check(found: dict[str, float], expected: dict[str, float], prefix: str = "") -> None:
    for name, value in expected.items():
        assert found[prefix + name] == pytest.approx(value, rel=1e-10, abs=1e-10), name


LOSSES = {
    "all": FDDConfig.paper(num_layers=2, ce_weight=0.5),
    "output alone": FDDConfig.paper(num_layers=2, alpha=0.0, beta=0.0),
    "dynamics alone": FDDConfig.paper(num_layers=2, output_kd_weight=0.0),
    "labels alone": FDDConfig.paper(
        num_layers=2, alpha=0.0, beta=0.0, output_kd_weight=0.0, ce_weight=1.0
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_whatever_the_loss_compares(models, name):
    """Models run for all sampled layers and to their end, and the loss stays what it is."""
    distiller = Distiller(*models, LOSSES[name])
    batches = [pad(ROWS[:3]), pad(ROWS[3:])]
    with torch.no_grad(), watching(distiller) as metrics:
        terms = [distiller(batch) for batch in batches]
    found = metrics.results(lambda tensor, _: tensor)
    expected = expected_means(models, ROWS, distiller.student_layers)
    assert found.keys() == expected.keys()
    check(found, expected)
    assert distiller.observer is None
    for batch, seen in zip(batches, terms):
        with torch.no_grad():
            plain = distiller(batch)
        for term, value in plain.named().items():
            torch.testing.assert_close(seen.named()[term], value, **EXACT, msg=term)


@pytest.mark.parametrize(
    ("family", "changes"), [("bert", {}), ("bart", {}), ("bart", {"encoder_weight": 0.5})], ids=str
)
def test_other_tasks_with_a_vocabulary(family, changes):
    """Masked LMs and encoder-decoders have the same metrics, of their own positions."""
    student, teacher = pair(family)
    distiller, batch = (
        Distiller(student, teacher, FDDConfig.paper(num_layers=2, **changes)),
        batch_of(family),
    )
    with torch.no_grad(), watching(distiller) as metrics:
        distiller(batch)
    found = metrics.results(lambda tensor, _: tensor)
    layers = distiller.student_layers, distiller.teacher_layers
    logits = [logits_of_layers(family, *of, batch) for of in zip((student, teacher), layers)]
    valid = batch["labels"] != -100
    expected = dense_metrics(*logits, batch["labels"], layers[0])
    means = {name: float(value[valid].detach().mean()) for name, value in expected.items()}
    check(found, {"perplexity": math.exp(means.pop("nll")), **means})


def test_a_task_without_a_vocabulary_has_no_metrics(models, monkeypatch):
    distiller = Distiller(*models, LOSSES["all"])
    monkeypatch.setattr(type(distiller.task), "has_lens", False)
    with torch.no_grad(), watching(distiller) as metrics:
        distiller(pad(ROWS))
    assert metrics.results(lambda tensor, _: tensor) == {}


def test_token_weights(models):
    batch, distiller = pad(ROWS), Distiller(*models, LOSSES["all"])
    weights = torch.arange(batch["labels"].numel()).remainder(4).view_as(batch["labels"]) / 2
    with torch.no_grad(), watching(distiller) as metrics:
        distiller(batch | {"token_weights": weights})
    found = metrics.results(lambda tensor, _: tensor)
    check(found, expected_means(models, ROWS, distiller.student_layers, weights.double()))


@pytest.mark.parametrize("wanted", [True, False])
def test_the_trainer_logs_them(models, tmp_path, wanted):
    student, teacher = models
    own = FDDTrainer(
        student,
        TrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=2
        ),
        teacher=teacher,
        fdd_config=LOSSES["output alone"],
        eval_dataset=ROWS,
        data_collator=pad,
        evaluation_metrics=wanted,
    )
    metrics = own.evaluate()
    if not wanted:
        assert not {"eval_perplexity", "eval_kl"} & metrics.keys()
        return
    check(metrics, expected_means(models, ROWS, own.distiller.student_layers), "eval_")
    assert metrics["eval_kl"] == pytest.approx(metrics["eval_output_kd"], rel=1e-10)
    assert own.state.log_history[-1]["eval_kl_layer_1"] == metrics["eval_kl_layer_1"]
    assert own.predict(ROWS).metrics["test_accuracy"] == metrics["eval_accuracy"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_teacher_layers": 2, "layer_alignment": "attention"},
        {"space": "feature", "trajectory": "mse"},
    ],
)
def test_layers_without_predictions_of_their_own(models, options):
    """Those that are not paired by rank, and those whose states are compared, have no KL."""
    config = FDDConfig.paper(num_layers=1, **options)
    distiller = Distiller(*models, config)
    with torch.no_grad(), watching(distiller) as metrics:
        distiller(pad(ROWS))
    found = metrics.results(lambda tensor, _: tensor)
    assert found.keys() == {"perplexity", "accuracy", "kl", "agreement"}
