"""Pairs of layers found from data: against the functions by hand, when they are found, resuming."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from fdd_kernels import (
    Distiller,
    FDDConfig,
    align_layers,
    fused_fdd_loss,
    layer_costs,
    plot_layer_alignment,
)
from fdd_kernels.backends import BACKENDS
from fdd_kernels.hf.alignment import LayerAlignment
from fdd_kernels.hf.positions import next_labels, valid_positions
from fdd_kernels.hf.teachers import model_states
from fdd_kernels.objectives.alignment.methods import METHODS
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import make_plan
from fdd_kernels.objectives.inputs import LossInputs
from tests.support.dense import gradients, models
from tests.support.hf_models import tiny_batch, tiny_model
from tests.support.training import examples, trainer

CONFIG = FDDConfig.paper(
    num_layers=3, num_teacher_layers=5, layer_alignment="attention", alignment_every=2
)
# Costs differ from those by hand by the rounding of one division, and weights by that of a cost
# times the costs' spread over epsilon, which is below 100.
ROUNDING = 1e3 * torch.finfo(torch.float64).eps


def stretched(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Make a student of 4 blocks, and a teacher of 8: near the student's, each before one that
    changes little. Deltas of different layers differ: random models are nearest in one layer.
    """
    student = tiny_model("llama", depth=4, seed=1, dtype=dtype)
    teacher = tiny_model("llama", depth=8, seed=2, dtype=dtype)
    teacher.lm_head.load_state_dict(student.lm_head.state_dict())
    parts = student.model.state_dict()
    teacher.model.load_state_dict({k: v for k, v in parts.items() if "layers" not in k}, False)
    for index, block in enumerate(student.model.layers):
        teacher.model.layers[2 * index].load_state_dict(block.state_dict())
        still = teacher.model.layers[2 * index + 1]
        with torch.no_grad():
            still.self_attn.o_proj.weight.mul_(0.05)
            still.mlp.down_proj.weight.mul_(0.05)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return student, teacher


STRETCHED = replace(
    CONFIG, student_layers=(1, 2, 3), teacher_layers=(1, 2, 3, 4, 5, 6), num_teacher_layers=None
)


def by_hand(distiller: Distiller, batch: dict, config: FDDConfig):
    """Compute terms from `layer_costs`, `align_layers` and `fused_fdd_loss`; return the costs
    too.
    """
    states = model_states(
        distiller.student, batch, distiller.student_layers, apply_final_norm=True, final=True
    )
    teacher = distiller.teacher_states(batch)
    heads = distiller.student.head.weight, distiller.teacher.head()[0]
    shared = {
        "labels": next_labels(batch, -100),
        "mask": valid_positions(batch, -100),
        "token_weights": batch.get("token_weights"),
        "temperature": config.temperature,
    }
    with torch.no_grad():
        costs = layer_costs(
            states[:-1], heads[0], teacher[:-1], heads[1], cost=config.trajectory, **shared
        )
    method = config.layer_alignment
    matrix = len(costs) * align_layers(costs, method, epsilon=config.alignment_epsilon)
    pairs = align_layers(costs, "monotone").argmax(1).tolist()
    if config.output_in_dynamics:
        matrix = torch.block_diag(matrix, torch.ones(1, 1, dtype=matrix.dtype))
        pairs = [*pairs, len(teacher) - 1]
    if config.layer_weights is not None:
        matrix = matrix * torch.tensor(config.layer_weights, dtype=matrix.dtype)[:, None]
    names = ("alpha", "beta", "output_kd_weight", "ce_weight", "trajectory", "derivative")
    terms = fused_fdd_loss(
        states,
        heads[0],
        teacher,
        heads[1],
        **shared,
        **{name: getattr(config, name) for name in names},
        output_in_dynamics=config.output_in_dynamics,
        layer_weights=matrix,
        derivative_layers=pairs,
        return_terms=True,
    )
    return terms, costs


def costs_of(distiller: Distiller) -> torch.Tensor:
    return torch.tensor(distiller.alignment.costs, dtype=torch.float64)


def require_by_hand(distiller: Distiller, student, batch: dict, rounding: float):
    """Compare costs, terms and gradients of step 0 with those by hand; return the latter's terms.

    Gradients are within `rounding` of their largest entry, the others of themselves.
    """
    terms = distiller(batch, step=0)
    terms.loss.backward()
    found = gradients(student)
    student.zero_grad()
    expected, costs = by_hand(distiller, batch, distiller.config)
    expected.loss.backward()
    tolerance = {"rtol": rounding, "atol": 0.0}
    torch.testing.assert_close(costs_of(distiller).to(costs.dtype), costs, **tolerance)
    for value, wanted in zip(terms, expected, strict=True):
        torch.testing.assert_close(value, wanted, **tolerance)
    wanted = gradients(student)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        budget = rounding * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=budget, msg=name)
    return expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_in_dynamics": True, "trajectory": "jsd:0.3", "temperature": 2.0},
        {"layer_weights": (1.0, 0.0, 2.0), "trajectory": "mse", "derivative": "mse"},
        {"teacher_layers": (2, 5), "ce_weight": 0.5, "alpha": 2.0},
        {"teacher_layers": (2, 4, 6), "beta": 0.0},
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_functions_by_hand(method, changes):
    config = replace(STRETCHED, layer_alignment=method, **changes)
    student, teacher = stretched()
    distiller = Distiller(student, teacher, config)
    batch = tiny_batch()
    generator = torch.Generator().manual_seed(3)
    batch["token_weights"] = torch.rand(batch["input_ids"].shape, generator=generator)
    student.train()
    expected = require_by_hand(distiller, student, batch, ROUNDING)
    assert len(set(distiller.alignment.derivative_layers)) == min(3, len(config.teacher_layers))
    if config.derivative == "cosine" and config.beta:
        assert 0.01 < expected.derivative < 0.9


def test_an_epsilon_sharpens_the_weights():
    found = {}
    for epsilon in (1e-5, 1e3):
        distiller = Distiller(*models(), replace(CONFIG, alignment_epsilon=epsilon))
        distiller(tiny_batch(), step=0)
        found[epsilon] = torch.tensor(distiller.alignment.weights)
    torch.testing.assert_close(found[1e3], torch.full((3, 5), 0.2), rtol=1e-2, atol=0)
    assert found[1e-5].amax(1).min() > 0.99


def test_pairs_are_found_again_after_so_many_steps_and_not_between():
    distiller = Distiller(*models(), CONFIG)
    head, found = distiller.student.head.weight, []
    for step in range(5):
        for seed in (1, 2):  # two micro-batches, of which the first decides
            distiller(tiny_batch(seed=seed), step=step).loss.backward()
            found.append(distiller.alignment.costs)
        with torch.no_grad():
            head.mul_(1.5)
    assert [found[i] == found[i - 1] for i in range(1, 10)] == [True] * 3 + [False] + [True] * 3 + [
        False,
        True,
    ]
    assert distiller.alignment.step == 4
    with torch.no_grad():
        assert distiller(tiny_batch(seed=3)).loss > 0
        distiller(tiny_batch(seed=3), step=99)
    assert (distiller.alignment.costs, distiller.alignment.step) == (found[-1], 4)
    expected = by_hand(distiller, tiny_batch(seed=1), CONFIG)[1]
    distiller(tiny_batch(seed=1), step=0)  # another training
    torch.testing.assert_close(costs_of(distiller), expected, rtol=ROUNDING, atol=0.0)


def test_an_evaluation_before_the_first_step_decides_nothing_for_the_training():
    distiller, other = Distiller(*models(), CONFIG), Distiller(*models(), CONFIG)
    with torch.no_grad():
        distiller(tiny_batch(seed=5))
    assert distiller.alignment.step is None
    assert distiller.alignment.weights is not None
    losses = [d(tiny_batch(), step=0).loss for d in (distiller, other)]
    assert torch.equal(*losses)
    assert distiller.state_dict() == other.state_dict()


def test_every_backend(backend):
    """In float32, where the C++ kernels and Triton compute; Triton takes one pair a layer."""
    method = "monotone" if backend == "triton" else "attention"
    config = replace(STRETCHED, layer_alignment=method, backend=backend)
    student, teacher = stretched(torch.float32)
    distiller = Distiller(student, teacher, config)
    require_by_hand(distiller, student, tiny_batch(), ROUNDING * 2.0**29)  # that of float32


def test_beside_a_schedule_that_leaves_the_dynamics_out_for_a_while():
    """Nothing is matched before they have a weight; the balance measures with the pairing."""
    config = replace(
        STRETCHED,
        stages="task=2:alpha=0,beta=0,ce_weight=1;dynamics:alpha=1,beta=1,ce_weight=0",
        gradient_balance="trajectory=1,derivative=0.5;every=1",
    )
    distiller = Distiller(*stretched(), config)
    for step in range(2):
        distiller(tiny_batch(), step=step).loss.backward()
        assert distiller.alignment.weights is None
    assert "aligned_layer/1" not in distiller.logged()
    terms = distiller(tiny_batch(), step=2)
    assert distiller.alignment.step == 2
    plain = replace(config, stages=None, gradient_balance=None)
    expected, _ = by_hand(distiller, tiny_batch(), plain)
    torch.testing.assert_close(terms.trajectory, expected.trajectory, rtol=ROUNDING, atol=0.0)
    torch.testing.assert_close(terms.derivative, expected.derivative, rtol=ROUNDING, atol=0.0)
    assert distiller.logged()["alpha"] != 1.0  # balanced
    assert distiller.logged().keys() >= {"aligned_layer/1", "alpha", "beta"}


@pytest.mark.parametrize("trouble", ["labels", "token_weights", "nan"])
def test_a_step_without_usable_costs_changes_nothing(trouble):
    distiller = Distiller(*models(), CONFIG)
    bad, weight = tiny_batch(seed=7), distiller.student.head.weight
    if trouble == "labels":
        bad["labels"] = torch.full_like(bad["labels"], -100)
    if trouble == "token_weights":
        bad["token_weights"] = torch.zeros(bad["labels"].shape)

    def step_badly(step):
        with torch.no_grad():
            before = weight[0, 0].clone()
            if trouble == "nan":
                weight[0, 0] = torch.nan
        loss = distiller(bad, step=step).loss.detach()
        with torch.no_grad():
            weight[0, 0] = before
        return loss

    assert step_badly(0).isnan() if trouble == "nan" else float(step_badly(0)) == 0
    assert distiller.alignment.step is None
    distiller(tiny_batch(), step=1)
    found = distiller.alignment.state_dict()
    assert distiller.alignment.step == 1
    step_badly(3)
    assert distiller.alignment.state_dict() == found
    distiller(tiny_batch(seed=2), step=4)
    assert distiller.alignment.step == 4


def copies(picked: list[int]) -> LossInputs:
    """Make a student of four layers and an output, and a teacher whose layers are `picked` of the
    student's, with a little noise.
    """
    generator = torch.Generator().manual_seed(11)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, head = [normal(20, 8) for _ in range(5)], normal(30, 8)
    teacher = [states[i] + 1e-3 * normal(20, 8) for i in [*picked, 4]]
    valid = torch.ones(20, dtype=torch.bool)
    return LossInputs(states, head, teacher, head, mask=valid)


def alignment_of(method: str, picked: list[int], **changes) -> tuple[LayerAlignment, LossOptions]:
    config = FDDConfig.paper(
        student_layers=(2, 4, 6, 8),
        teacher_layers=tuple(range(1, 1 + len(picked))),
        layer_alignment=method,
        **changes,
    )
    alignment = LayerAlignment(config, config.student_layers, config.teacher_layers)
    return alignment, alignment.paired_options(LossOptions(), copies(picked), 0)


@pytest.mark.parametrize("method", METHODS)
def test_permuted_layers_are_found(method):
    picked = [2, 0, 3, 1]
    epsilon = {"alignment_epsilon": 0.01} if method in ("attention", "sinkhorn") else {}
    alignment, _ = alignment_of(method, picked, **epsilon)
    right = torch.zeros(4, 4).index_put((torch.tensor(picked), torch.arange(4)), torch.ones(4))
    found = torch.tensor(alignment.weights)
    if method == "monotone":  # it cannot follow: its pairs are those of the least total cost
        assert list(alignment.derivative_layers) == sorted(alignment.derivative_layers)
        assert torch.equal(found.argmax(1), torch.tensor(alignment.derivative_layers))
    else:
        torch.testing.assert_close(found, right, rtol=0, atol=1e-6)
        layers = [float(row @ torch.arange(1.0, 5.0)) for row in right]
        assert list(alignment.mean_layers().values()) == pytest.approx(layers, abs=1e-5)
    assert list(alignment.mean_layers()) == [f"aligned_layer/{n}" for n in (2, 4, 6, 8)]


@pytest.mark.parametrize("picked", [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 1, 2, 3], [0, 3]])
def test_stretched_layers_are_found_in_order(picked):
    alignment, options = alignment_of("monotone", picked)
    found = [picked[j] for j in alignment.derivative_layers]
    if len(picked) > 4:
        assert found == [0, 1, 2, 3]
    else:  # those between go to one of their neighbours
        assert found == sorted(found)
        assert (found[0], found[-1]) == (0, 3)
    one_hot = torch.nn.functional.one_hot(torch.tensor(alignment.derivative_layers), len(picked))
    assert torch.equal(torch.tensor(options.layer_weights), one_hot.float())
    assert options.derivative_layers == alignment.derivative_layers


def test_the_derivative_has_a_teacher_layer_of_its_own_for_each_student_layer():
    """Though every layer of the student is nearest to one layer of the teacher."""
    alignment, _ = alignment_of("argmin", [0, 3, 3, 3, 3])
    assert len(set(alignment.derivative_layers)) == 4
    with pytest.warns(UserWarning, match=r"teacher layer \d with every sampled layer"):
        alignment, _ = alignment_of("monotone", [0, 0, 0])
    assert len(set(alignment.derivative_layers)) == 1


def test_one_teacher_layer_each_runs_on_every_backend():
    """Triton compares a student layer with one teacher layer; so do the pairs of "monotone"."""
    options = alignment_of("monotone", [0, 1, 1, 1, 2, 3])[1]
    plan, _ = make_plan(replace(options, backend="torch"), copies([0, 1, 1, 1, 2, 3]))
    assert BACKENDS["triton"].refusal(plan.spec) is None
    soft = alignment_of("attention", [0, 1, 1, 1, 2, 3])[1]
    plan, _ = make_plan(replace(soft, backend="torch"), copies([0, 1, 1, 1, 2, 3]))
    assert "teacher layers" in BACKENDS["triton"].refusal(plan.spec)


CHANGES = [
    ({"layer_alignment": "nearest"}, "layer_alignment='nearest' is not one of 'rank', 'argmin'"),
    ({"alignment_every": 0}, "alignment_every=0 must be at least 1"),
    ({"alignment_epsilon": 0.0}, "alignment_epsilon=0.0 must be finite and greater than 0"),
    (
        {"layer_alignment": "emd", "alignment_epsilon": 0.1},
        "alignment_epsilon=0.1 has no effect on layer_alignment='emd'.*\"attention\" or",
    ),
    ({"layer_alignment": "rank", "alignment_every": 7}, "alignment_every=7 has no effect"),
    (
        {"layer_alignment": "rank", "alignment_every": 100},
        "num_layers=3 and num_teacher_layers=5 are unequal .* a layer_alignment, or layer_weights",
    ),
    ({"num_teacher_layers": 0}, "num_teacher_layers=0 must be at least 1"),
    (
        {"student_layers": (1, 2), "teacher_layers": (1, 2, 3)},
        r"num_teacher_layers=5 samples layers, but teacher_layers=\(1, 2, 3\) names them",
    ),
    ({"num_layers": 0}, "layer_alignment='attention' pairs sampled layers, and there are none"),
    ({"alpha": 0.0, "beta": 0.0}, "alpha=0 and beta=0 leave both out"),
    ({"layer_weights": ((1.0,) * 5,) * 3}, "layer_weights=.*layer_alignment='attention' finds"),
    ({"derivative_layers": (0, 1, 2)}, r"derivative_layers=\(0, 1, 2\) .* one of the two"),
    ({"layer_weights": (1.0, 2.0)}, "has 2 entries and the trajectory 3 layers"),
    *[
        (
            {"layer_alignment": method, "backend": "triton"},
            f"layer_alignment='{method}' may compare .* backend='triton' cannot: use "
            'layer_alignment="monotone", or backend="auto"',
        )
        for method in ("attention", "sinkhorn", "emd", "argmin")
    ],
]


@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=lambda c: str(c)[:60])
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_triton_takes_methods_that_pair_with_one_teacher_layer():
    assert replace(CONFIG, layer_alignment="monotone", backend="triton").backend == "triton"
    replace(CONFIG, layer_alignment="argmin", beta=0.0, backend="triton")
    replace(CONFIG, layer_alignment="argmin", derivative=None, backend="triton")


def test_vocabulary_parallelism_is_refused():
    with pytest.raises(ValueError, match=r"vocab_group .* layer_alignment='attention'"):
        Distiller(*models(), CONFIG, vocab_group=object())


def test_training_needs_the_step():
    distiller = Distiller(*models(), CONFIG)
    with pytest.raises(ValueError, match=r"distiller\(batch, step=...\)"):
        distiller(tiny_batch())


def test_layers_that_a_model_does_not_have():
    with pytest.raises(ValueError, match=r"num_teacher_layers=9 .*lower num_teacher_layers"):
        Distiller(*models(), replace(CONFIG, num_teacher_layers=9))


def test_a_state_of_other_layers_is_refused():
    distiller = Distiller(*models(), CONFIG)
    distiller(tiny_batch(), step=0)
    state = json.loads(json.dumps(distiller.state_dict()))
    twin = Distiller(*models(), CONFIG)
    twin.load_state_dict(state)
    assert twin.state_dict() == distiller.state_dict()
    assert torch.equal(*[d(tiny_batch(), step=1).loss for d in (twin, distiller)])
    other = Distiller(*models(), replace(CONFIG, num_teacher_layers=4))
    with pytest.raises(ValueError, match=r"has teacher_layers=.* this training"):
        other.load_state_dict(state)


def test_a_loaded_state_replaces_what_was_trained_after_it():
    distiller = Distiller(*models(), CONFIG)
    distiller(tiny_batch(), step=0)
    state = json.loads(json.dumps(distiller.state_dict()))
    distiller(tiny_batch(), step=5)
    assert distiller.alignment.step == 5
    distiller.load_state_dict(state)
    distiller(tiny_batch(), step=1)  # before the next matching, at step 2
    assert distiller.alignment.state_dict() == state["alignment"]


def test_without_an_alignment_nothing_changes():
    student, teacher = models()
    distiller = Distiller(student, teacher, FDDConfig.paper(num_layers=3))
    assert distiller.alignment is None
    assert distiller(tiny_batch()).loss.requires_grad
    aligned = Distiller(*models(), CONFIG)
    for one, other in ((distiller, aligned), (aligned, distiller)):
        with pytest.raises(ValueError, match="layer alignment, but the config has layer_align"):
            one.load_state_dict(other.state_dict())
    for state in ({}, {"schedules": {"step": None, "values": {}}}):
        with pytest.raises(ValueError, match="it is not of a Distiller"):
            aligned.load_state_dict(state)


def run(folder, **arguments):
    return trainer(
        folder,
        train=examples([9] * 24),
        held_out=examples([7] * 4),
        config=FDDConfig.paper(
            num_layers=2,
            layer_weights=(1.0, 0.5),
            layer_alignment="attention",
            alignment_every=2,
        ),
        save_strategy="steps",
        save_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_on_start=True,
        max_steps=6,
        **arguments,
    )


def test_a_trainer_logs_and_resumes_bit_for_bit(tmp_path):
    whole = run(tmp_path)
    whole.train()
    history = whole.state.log_history
    entries = [entry for entry in history if "layer_alignment" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    last = entries[-1]["layer_alignment"]
    assert last == whole.distiller.alignment.state_dict()
    assert (last["student_layers"], last["teacher_layers"]) == ([1, 2], [1, 2])
    trained = [entry for entry in history if "loss" in entry]
    layers = [entry["aligned_layer/1"] for entry in trained]
    assert [layers[i] == layers[i - 1] for i in range(1, 6)] == [True, False, True, False, True]
    assert layers[-1] == whole.distiller.alignment.mean_layers()["aligned_layer/1"]
    json.dumps(history)
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert resumed.distiller.state_dict() == whole.distiller.state_dict()
    again = [entry for entry in resumed.state.log_history if "layer_alignment" in entry]
    assert again == entries


@pytest.mark.parametrize("name", ["pairs.svg", "pairs.png"])
def test_a_plot(tmp_path, name):
    pytest.importorskip("matplotlib")
    weights = torch.rand(2, 3).softmax(1)
    for costs in (None, torch.rand(2, 3), [[0.0] * 3] * 2):
        plot_layer_alignment(weights, (2, 4), (3, 6, 9), tmp_path / name, costs=costs)
        assert (tmp_path / name).stat().st_size > 1000
    wide = torch.eye(2, 40)
    plot_layer_alignment(wide, (1, 2), range(40), str(tmp_path / name))
    with pytest.raises(ValueError, match=r"costs has shape \(2, 2\), but .* 2 rows and 3 columns"):
        plot_layer_alignment(weights, (2, 4), (3, 6, 9), tmp_path / name, costs=torch.zeros(2, 2))


def test_a_plot_without_matplotlib(tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match="needs matplotlib: pip install matplotlib"):
        plot_layer_alignment([[1.0]], (1,), (2,), tmp_path / "pairs.svg")
    assert not list(tmp_path.iterdir())
