"""Classifiers, question answering and embeddings: against dense formulas, bad input, training."""

from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels import Distiller, FDDConfig
from tests.support.dense import gradients
from tests.support.task_models import TASKS, hidden_states, pair, task_batch, task_model

CONFIG = FDDConfig.paper(
    space="feature",
    trajectory="mse",
    student_layers=(1, 2),
    teacher_layers=(2, 4),
    alpha=0.7,
    beta=1.3,
    ce_weight=0.5,
    output_temperature=1.5,
)
EMBEDDING = replace(CONFIG, ce_weight=0.0, output_temperature=1.0, output_divergence="cosine")
# Both sides are float64, with sums of at most some thousand numbers of about 1.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
# Llama's norms are float32 inside of a float64 model: each gradient passes through a few of them.
FLOAT32_NORMS = {"rtol": 1e-6, "atol": 1e-6}


def config_of(task: str) -> FDDConfig:
    return EMBEDDING if task == "embedding" else CONFIG


def kl(z_t: Tensor, z_s: Tensor, temperature: float) -> Tensor:
    log_p, log_q = ((z / temperature).log_softmax(-1) for z in (z_t, z_s))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_of(rows: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens of each sequence, (batch,)."""
    return torch.stack([row[own].mean() for row, own in zip(rows, mask)])


def dense_terms(family, task, student, teacher, batch, config, weight):
    """The formulas row by row, from the models' own results; a mean over valid rows."""
    targets = ("labels", "start_positions", "end_positions")
    inputs = {k: v for k, v in batch.items() if k not in targets}
    mask = batch["attention_mask"].bool()
    ours, own = hidden_states(student, family, inputs, config.student_layers)
    with torch.no_grad():
        theirs, other = hidden_states(teacher, family, inputs, config.teacher_layers)
    z = [h @ weight.T for h in ours]
    trajectory = sum((s - t).square().mean(-1) for s, t in zip(z, theirs)) / 2
    derivative = 1 - F.cosine_similarity(z[1] - z[0], theirs[1] - theirs[0], dim=-1)
    temperature, ce = config.output_temperature, None
    if task == "token_classification":
        valid = batch["labels"] != -100
        kd = kl(other.logits, own.logits, temperature)[valid]
        ce = F.cross_entropy(own.logits[valid], batch["labels"][valid], reduction="none")
        trajectory, derivative = trajectory[valid], derivative[valid]
    else:
        trajectory, derivative = mean_of(trajectory, mask), mean_of(derivative, mask)
    if task == "sequence_classification":
        valid = batch["labels"] != -100
        kd = kl(other.logits, own.logits, temperature)[valid]
        ce = F.cross_entropy(own.logits[valid], batch["labels"][valid], reduction="none")
        trajectory, derivative = trajectory[valid], derivative[valid]
    if task == "question_answering":
        both = []
        for name in ("start", "end"):
            z_s, z_t = (getattr(o, f"{name}_logits") for o in (own, other))
            rows = [kl(t[m], s[m], temperature) for s, t, m in zip(z_s, z_t, mask)]
            labels = batch[f"{name}_positions"]
            both.append((torch.stack(rows), F.cross_entropy(z_s, labels, reduction="none")))
        kd, ce = (torch.stack(parts).mean(0) for parts in zip(*both))
    if task == "embedding":

        def pooled(h):
            if config.pooling == "cls":
                return torch.stack([row[own][0] for row, own in zip(h, mask)])
            return torch.stack([row[own].mean(0) for row, own in zip(h, mask)])

        e_s = pooled(own.last_hidden_state) @ weight.T
        e_t = pooled(other.last_hidden_state)
        kd = 1 - F.cosine_similarity(e_s, e_t, dim=-1)
        if config.output_divergence == "mse":
            kd = (e_s - e_t).square().mean(-1)
    ce = torch.zeros_like(kd) if ce is None else ce
    kd, trajectory, derivative, ce = (term.mean() for term in (kd, trajectory, derivative, ce))
    loss = kd + config.alpha * trajectory + config.beta * derivative + config.ce_weight * ce
    return loss, kd, trajectory, derivative, ce


def compare(family, task, config, batch, **changes):
    """Compare terms and gradients of the student and of the projection with the formulas."""
    student, teacher = pair(family, task, **changes)
    distiller = Distiller(student, teacher, config)
    modules = torch.nn.ModuleList([student, distiller.projection])
    terms = distiller(batch)
    terms.loss.backward()
    found = gradients(modules)
    modules.zero_grad()
    weight = distiller.projection.weight
    expected = dense_terms(family, task, student, teacher, batch, config, weight)
    expected[0].backward()
    close = FLOAT32_NORMS if family == "llama" else CLOSE
    for name, actual, wanted in zip(terms._fields, terms, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **close, msg=lambda m, n=name: f"{n}: {m}")
    wanted = gradients(modules)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, **close, msg=lambda m, n=name: n + m)
    return distiller, terms


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_terms_and_gradients_equal_the_formulas(family, task):
    batch = task_batch(task)
    distiller, terms = compare(family, task, config_of(task), batch)
    if task != "embedding":
        inputs = dict(batch)
        own = distiller.student.model(**inputs).loss
        torch.testing.assert_close(terms.ce, own, **CLOSE)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("roberta", "sequence_classification"),
        ("distilbert", "question_answering"),
        ("deberta_v2", "token_classification"),
        ("albert", "sequence_classification"),
        ("electra", "embedding"),
        ("gpt2", "sequence_classification"),
        ("llama", "sequence_classification"),
    ],
)
def test_families(family, task):
    compare(family, task, config_of(task), task_batch(task))


def test_shared_blocks_that_run_unequally_often():
    """ALBERT with two groups in three layers: the first runs twice."""
    task = "sequence_classification"
    distiller, _ = compare("albert", task, config_of(task), task_batch(task), num_hidden_groups=2)
    first, second = distiller.student.model.albert.encoder.albert_layer_groups
    assert list(distiller.student.blocks) == [first, first, second]


@pytest.mark.parametrize("task", ["question_answering", "embedding"])
def test_padding_on_the_left(task):
    config = replace(config_of(task), pooling="cls" if task == "embedding" else "mean")
    compare("bert", task, config, task_batch(task, side="left"))


@pytest.mark.parametrize(("divergence", "pooling"), [("mse", "mean"), ("cosine", "cls")])
def test_embeddings(divergence, pooling):
    config = replace(EMBEDDING, output_divergence=divergence, pooling=pooling)
    compare("bert", "embedding", config, task_batch("embedding"))


def bernoulli(z_t: Tensor, z_s: Tensor, temperature: float) -> Tensor:
    """The sum over labels of KL between the probabilities that each is there."""
    p, q = ((z / temperature).sigmoid() for z in (z_t, z_s))
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)


@pytest.mark.parametrize("kind", ["multi_label", "regression", "several_numbers"])
def test_other_kinds_of_labels(kind):
    """Output KD and the model's own loss, with a row that a data loader repeats left out."""
    options = {"num_labels": 1} if kind == "regression" else {}
    if kind == "several_numbers":
        options["problem_type"] = "regression"
    student, teacher = pair("bert", "sequence_classification", **options)
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(3, generator=generator, dtype=torch.float64)
    if kind != "regression":
        labels = torch.rand(3, 3, generator=generator, dtype=torch.float64).round()
    batch = task_batch("sequence_classification") | {"labels": labels}
    config = replace(CONFIG, alpha=0.0, beta=0.0)
    if kind != "multi_label":
        config = replace(config, output_temperature=1.0)
    distiller = Distiller(student, teacher, config)
    assert distiller.projection is None
    inputs = {k: v[:2] for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        target = teacher(**inputs).logits
    own = student(**inputs, labels=labels[:2])
    kd = (own.logits - target).square().mean(-1)
    if kind == "multi_label":
        kd = bernoulli(target, own.logits, config.output_temperature)
    expected = kd.mean() + config.ce_weight * own.loss
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    batch = distiller.without_rows_from(batch, 2)
    assert distiller.count_positions(batch) == 2
    terms = distiller(batch)
    terms.loss.backward()
    torch.testing.assert_close(terms.loss, expected, **CLOSE)
    torch.testing.assert_close(terms.ce, own.loss, **CLOSE)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, wanted[name], **CLOSE)


@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_add_up(task):
    """To the loss of the whole batch, with alignment, deviation and a changed denominator."""
    batch = task_batch(task)
    config = replace(config_of(task), layer_alignment="attention", num_layers=2)
    distiller = Distiller(*pair("bert", task), config)
    whole, count = distiller(batch, step=0), distiller.count_positions(batch)
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    found = [distiller(part, num_items_in_batch=count, step=0) for part in parts]
    for name, wanted in whole.named().items():
        total = sum(getattr(terms, name) for terms in found)
        torch.testing.assert_close(total, wanted, **CLOSE, msg=lambda m, n=name: n + m)


def test_rows_that_are_left_out_of_every_term():
    """Of token classification: tokens without a label, and a sequence that is repeated."""
    batch = task_batch("token_classification")
    distiller = Distiller(*pair("bert", "token_classification"), CONFIG)
    left = distiller.without_rows_from(batch, 2)
    expected = distiller({k: v[:2] for k, v in batch.items()})
    for found, wanted in zip(distiller(left), expected):
        torch.testing.assert_close(found, wanted, **CLOSE)
    nothing = distiller.without_rows_from(batch, 0)
    assert distiller.count_positions(nothing) == 0
    assert float(distiller(nothing).loss.detach()) == 0


def test_token_weights_of_token_classification():
    batch = task_batch("token_classification")
    distiller = Distiller(*pair("bert", "token_classification"), CONFIG)
    weights = torch.full(batch["input_ids"].shape, 0.5, dtype=torch.float64)
    for half, term in zip(distiller(batch | {"token_weights": weights}), distiller(batch)):
        torch.testing.assert_close(half, term / 2, **CLOSE)


def test_parameters_without_gradient_are_named():
    for task, options in (("embedding", {}), ("sequence_classification", {"ce_weight": 0.0})):
        config = replace(config_of(task), **options)
        if options:
            config = replace(config, output_kd_weight=0.0)
        distiller = Distiller(*pair("bert", task), config)
        distiller(task_batch(task)).loss.backward()
        model = distiller.student.model
        without = [name for name, p in model.named_parameters() if p.grad is None]
        assert distiller.parameters_without_gradient() == without
        assert any("pooler" in name for name in without)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("embedding", {"output_divergence": "kl"}, "embedding models give vectors: give output_di"),
        ("embedding", {"ce_weight": 1.0}, "ce_weight=1 needs labels"),
        ("embedding", {"output_temperature": 2.0}, "output_temperature=2.0 changes the logits"),
        ("embedding", {"student_softcap": 3.0}, "student_softcap=3.0 changes the logits"),
        ("sequence_classification", {"space": "lens", "trajectory": "kl"}, 'space="lens" compares'),
        ("sequence_classification", {"vocab_size": 3}, "vocab_size=3 is of a vocabulary"),
        ("sequence_classification", {"train_head": False}, "train_head=False is of a language mod"),
        ("question_answering", {"output_divergence": "mse"}, "'mse' compares embeddings"),
        ("question_answering", {"pooling": "cls"}, "pooling='cls' makes embeddings"),
    ],
)
def test_options_without_a_meaning_are_refused(task, options, message):
    with pytest.raises(ValueError, match=message):
        Distiller(*pair("bert", task), replace(config_of(task), **options))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("sequence_classification", {"labels": None}, "no labels, which ce_weight=0.5 needs"),
        ("question_answering", {"end_positions": None}, "no end_positions, which ce_weight"),
        ("sequence_classification", {"labels": torch.zeros(2)}, "shape .2,., but there are 3 seq"),
        ("sequence_classification", {"token_weights": torch.ones(3, 8)}, "token_weights are of t"),
        ("sequence_classification", {"labels": torch.tensor([0, 7, 1])}, "7"),
        ("sequence_classification", {"labels": torch.zeros(3, 3).long()}, r"needs \(3,\): corr"),
        ("sequence_classification", {"labels": torch.zeros(3)}, r"multi_label.* needs \(3, 3\)"),
        ("token_classification", {"labels": torch.zeros(3).long()}, "labels has shape"),
    ],
)
def test_batches_that_do_not_fit_are_refused(task, changes, message):
    distiller = Distiller(*pair("bert", task), config_of(task))
    batch = {k: v for k, v in (task_batch(task) | changes).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        distiller(batch)


@pytest.mark.parametrize(
    "changes", [{"output_temperature": 2.0}, {"output_divergence": "tv"}, {"scale_by_t2": True}]
)
def test_numbers_have_no_distribution(changes):
    models = pair("bert", "sequence_classification", num_labels=1)
    config = replace(CONFIG, output_temperature=1.0)
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* predict"):
        Distiller(*models, replace(config, **changes))
    Distiller(*models, replace(config, **changes, output_kd_weight=0.0))


def test_several_labels_are_told_by_the_teacher():
    """In a batch without labels, where a new student's config does not say it."""
    student, teacher = pair("bert", "sequence_classification")
    teacher.config.problem_type = "multi_label_classification"
    batch = task_batch("sequence_classification")
    del batch["labels"]
    config = FDDConfig(alpha=0.0, beta=0.0, num_layers=0)
    found = Distiller(student, teacher, config)(batch).loss
    with torch.no_grad():
        wanted = bernoulli(teacher(**batch).logits, student(**batch).logits, 1.0).mean()
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("task", ["sequence_classification", "question_answering"])
def test_a_column_of_labels(task):
    distiller, batch = Distiller(*pair("bert", task), CONFIG), task_batch(task)
    columns = {name: batch[name][:, None] for name in distiller.task.targets}
    for found, wanted in zip(distiller(batch | columns), distiller(batch)):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_frozen_student_has_no_parameter_without_gradient():
    student, teacher = pair("bert", "embedding")
    student.requires_grad_(False)
    assert Distiller(student, teacher, EMBEDDING).parameters_without_gradient() == []
    student.pooler.requires_grad_(True)
    found = Distiller(student, teacher, EMBEDDING).parameters_without_gradient()
    assert found == ["pooler.dense.weight", "pooler.dense.bias"]


def test_models_that_do_not_fit_are_refused():
    def teacher(task="sequence_classification", **changes):
        return task_model("bert", task, depth=6, **changes)

    student = task_model("bert", "sequence_classification")
    with pytest.raises(ValueError, match="num_labels=3 and the teacher num_labels=4: load the st"):
        Distiller(student, teacher(num_labels=4), CONFIG)
    with pytest.raises(TypeError, match=r"task sequence_classification and the teacher .* embeddi"):
        Distiller(student, teacher("embedding"), CONFIG)
    student.config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.warns(UserWarning, match="logits are compared by their number"):
        Distiller(student, teacher(id2label={0: "b", 1: "a", 2: "c"}), CONFIG)


@pytest.mark.slow
def test_lora_checkpointing_and_data_parallelism():
    """A student inside of peft and DistributedDataParallel has the gradients of the plain one."""
    batch = task_batch("sequence_classification")
    student, teacher = pair("bert", "sequence_classification")
    lora = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    student = peft.get_peft_model(student, lora).train()
    distiller = Distiller(student, teacher, CONFIG)
    terms = distiller(batch)
    terms.loss.backward()
    expected = gradients(student)
    student.zero_grad()
    assert any("lora_A" in name for name in expected)
    assert any("classifier" in name for name in expected)
    student.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        # BERT's pooler is frozen here, and every other parameter that trains is reached.
        wrapped = torch.nn.parallel.DistributedDataParallel(student)
        again = distiller(batch, student=wrapped)
        again.loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(again.loss, terms.loss, **CLOSE)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)
