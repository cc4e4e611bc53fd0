"""Trajectory and derivative of states: against dense PyTorch, the projection, what is refused."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels import Distiller, FDDConfig, align_layers
from fdd_kernels.hf.positions import valid_positions
from tests.support.dense import dense_terms, final_norm, gradients
from tests.support.hf_models import tiny_batch, tiny_model

CONFIG = FDDConfig.paper(
    space="feature", trajectory="mse", num_layers=3, ce_weight=0.5, alpha=0.7, beta=1.3
)
LAYERS = (1, 2, 3), (2, 4, 6)
# Both sides are float64: students are of families whose norms are too.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def models(student="gpt2", teacher="llama", teacher_width=48):
    width = {"n_embd" if teacher == "gpt2" else "hidden_size": teacher_width}
    return (
        tiny_model(student, depth=4, seed=1, dtype=torch.float64),
        tiny_model(teacher, depth=8, seed=2, dtype=torch.float64, **width),
    )


def features(model, batch, layers, config) -> list[Tensor]:
    """States of blocks after the last norm, from `output_hidden_states`."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    norm = final_norm(model)
    found = [norm(hidden[k], config.apply_final_norm) for k in layers]
    return [*found, hidden[-1]] if config.output_in_dynamics else found


def distance(kind: str, s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().mean(-1) if kind == "mse" else 1 - F.cosine_similarity(s, t, dim=-1)


def dense_feature_terms(distiller, student, teacher, batch, layers=LAYERS):
    """Compute (loss, trajectory, derivative) of the formulas, row by row."""
    config, weight = distiller.config, distiller.projection
    weight = torch.eye(32, dtype=torch.float64) if weight is None else weight.weight
    mask = valid_positions(batch, -100)
    ours = [h[mask] for h in features(student, batch, layers[0], config)]
    with torch.no_grad():
        theirs = [h[mask] for h in features(teacher, batch, layers[1], config)]
    if config.rows == "deviation":
        ours, theirs = ([h - h.mean(0) for h in of_model] for of_model in (ours, theirs))
    ours = [h @ weight.T for h in ours]
    costs = torch.stack(
        [torch.stack([distance(config.trajectory, s, t).mean() for t in theirs]) for s in ours]
    )
    matrix, pairs = torch.eye(len(ours), dtype=costs.dtype), range(len(ours))
    if config.layer_alignment != "rank":
        found = costs.detach()
        matrix = len(ours) * align_layers(found, config.layer_alignment)
        increasing = itertools.combinations(range(len(theirs)), len(ours))
        pairs = min(increasing, key=lambda path: sum(found[i, j] for i, j in enumerate(path)))
    trajectory = (matrix * costs).sum() / len(ours)
    theirs = [theirs[j] for j in pairs]
    derivative = sum(
        distance(config.derivative, s1 - s0, t1 - t0).mean()
        for s0, s1, t0, t1 in zip(ours, ours[1:], theirs, theirs[1:])
    ) / (len(ours) - 1)
    output = dense_terms(student, teacher, batch, replace(CONFIG, alpha=0.0, beta=0.0))
    loss = output.loss + config.alpha * trajectory + config.beta * derivative
    return loss, output.output_kd, trajectory, derivative, output.ce


def compare(student, teacher, config, batch=None, **options):
    """Compare terms and all gradients, the projection's too, with the dense formula."""
    batch = tiny_batch() if batch is None else batch
    distiller = Distiller(student, teacher, config)
    terms = distiller(batch, step=0)
    terms.loss.backward()
    trained = {"student": student}
    if distiller.projection is not None:
        trained["projection"] = distiller.projection
    found = {f"{k}.{n}": g for k, m in trained.items() for n, g in gradients(m).items()}
    for module in trained.values():
        module.zero_grad()
    expected = dense_feature_terms(distiller, student, teacher, batch, **options)
    expected[0].backward()
    for actual, wanted in zip(terms, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)
    wanted = {f"{k}.{n}": g for k, m in trained.items() for n, g in gradients(m).items()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert "projection" not in name or gradient.abs().max() > 1e-4
    return distiller


@pytest.mark.parametrize(
    ("pair", "width", "options"),
    [
        (("gpt2", "llama"), 48, {}),
        (("gpt2", "gpt2"), 32, {"derivative": "mse"}),
        (("gpt2", "gemma2"), 32, {"projection": "linear", "trajectory": "cosine"}),
        (("gpt2", "llama"), 48, {"rows": "deviation", "apply_final_norm": False}),
        (("gpt2", "llama"), 32, {"rows": "deviation", "trajectory": "cosine"}),
        (("gpt2", "gpt2"), 24, {"output_in_dynamics": True}),
    ],
)
def test_terms_and_gradients_equal_the_dense_formula(pair, width, options):
    distiller = compare(*models(*pair, width), replace(CONFIG, **options))
    assert (distiller.projection is None) == (width == 32 and "projection" not in options)


def test_layer_alignment():
    config = replace(CONFIG, layer_alignment="attention", num_teacher_layers=4)
    distiller = compare(*models(), config, layers=(LAYERS[0], (1, 2, 3, 4)))
    assert distiller.alignment.weights is not None


def test_num_items_in_batch_and_token_weights():
    (student, teacher), batch = models(), tiny_batch()
    distiller = Distiller(student, teacher, CONFIG)
    count = distiller.count_positions(batch)
    whole = distiller(batch)
    torch.testing.assert_close(
        distiller(batch, num_items_in_batch=4 * count).loss, whole.loss / 4, **CLOSE
    )
    halves = batch | {"token_weights": torch.full(batch["input_ids"].shape, 0.5).double()}
    for term, half in zip(whole, distiller(halves)):
        torch.testing.assert_close(half, term / 2, **CLOSE)


def test_the_projection_is_semi_orthogonal_and_follows_the_seed():
    (student, teacher), weights = models(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(Distiller(student, teacher, CONFIG).projection.weight.detach())
    assert weights[0].shape == (48, 32)
    # orthogonal_ rounds in the dtype that it was made in, float32.
    torch.testing.assert_close(
        weights[0].T @ weights[0], torch.eye(32).double(), rtol=0, atol=32 * 2**-23
    )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_student_runs_no_further_than_its_last_layer():
    """Without output terms: blocks and head after it get no gradient, and are named."""
    student, teacher = models()
    config = replace(CONFIG, output_kd_weight=0.0, ce_weight=0.0, apply_final_norm=False)
    distiller = Distiller(student, teacher, config)
    ran = []
    student.transformer.h[3].register_forward_hook(lambda *_: ran.append(3))
    distiller(tiny_batch()).loss.backward()
    without = [name for name, p in student.named_parameters() if p.grad is None]
    assert not ran
    assert "transformer.ln_f.weight" in without
    assert distiller.parameters_without_gradient() == without


def test_schedules_stages_and_balance():
    """A stage without dynamics runs no layers; the balance measures terms of both spaces."""
    student, teacher = models()
    config = replace(
        CONFIG,
        ce_weight=0.0,
        stages="kd=1:alpha=0,beta=0;all:alpha=1,beta=1",
        gradient_balance="output_kd=1,trajectory=1;every=1",
        alpha=FDDConfig.alpha,
        beta=FDDConfig.beta,
    )
    distiller, batch = Distiller(student, teacher, config), tiny_batch()
    first, second = (distiller(batch, step=step) for step in (0, 1))
    assert first.trajectory == 0
    assert second.trajectory > 0
    logged = distiller.logged()
    plain = replace(config, stages=None, gradient_balance=None, **logged)
    found = Distiller(student, teacher, plain)
    found.projection.load_state_dict(distiller.projection.state_dict())
    torch.testing.assert_close(found(batch).loss, second.loss, **CLOSE)
    assert logged["alpha"] != 1


def test_a_projection_without_optimizer_is_warned_of_once():
    (student, teacher), batch = models(), tiny_batch()
    distiller = Distiller(student, teacher, CONFIG)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)

    def steps(count):
        for _ in range(count):
            distiller(batch).loss.backward()
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(2)
    with pytest.warns(UserWarning, match="projection has not: give its parameters to the opt"):
        steps(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(2)
        distiller = Distiller(student, teacher, CONFIG)
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.projection.parameters()])
        steps(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"trajectory": "kl"},
            "trajectory='kl' compares distributions, .* give trajectory=\"mse\"",
        ),
        ({"derivative": "weighted_cosine"}, "derivative='weighted_cosine' weighs tokens"),
        ({"temperature": 2.0}, "temperature=2 divides the logits"),
        ({"schedules": "derivative_temperature=linear:1,2,0,5"}, "derivative_temperature=1.2 div"),
        ({"space": "lens", "trajectory": "kl", "rows": "deviation"}, "rows='deviation' is an op"),
        ({"space": "lens", "projection": "linear"}, "projection='linear' is an option of feature"),
        ({"space": "logits"}, "space='logits' is not one of"),
        ({"rows": "tokens"}, "rows='tokens' is not one of"),
        ({"projection": "none"}, "projection='none' is not one of"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)
