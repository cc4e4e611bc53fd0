"""Compare Distiller with dense computations: options, labels, padding, packing, dtypes, heads."""

import functools

import peft
import pytest
import torch
import torch.nn.functional as F

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.hf.positions import valid_positions
from tests.support.dense import CONFIG, compare_with_dense, dense_terms, gradients, models
from tests.support.hf_models import VOCAB, pad_left, tiny_batch, tiny_model


@pytest.mark.parametrize(
    "pair",
    [
        ("llama", "gpt2"),
        ("gpt2", "llama_tied"),
        ("gemma2", "granite"),
        ("opt_projections", "llama"),
        ("llama_tied", "gemma2"),
        ("granite", "opt_projections"),
    ],
)
def test_terms_and_gradients_equal_the_dense_loss(pair):
    # float32 norms inside float64 models (Llama's) round alike on both sides.
    compare_with_dense(*models(*pair), tiny_batch(), rtol=1e-6, atol=1e-8)


def test_float32_models():
    compare_with_dense(*models(dtype=torch.float32), tiny_batch(), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "options", [{"apply_final_norm": False}, {"train_head": False}, {"ce_weight": 0.0}]
)
@pytest.mark.parametrize(
    "pair", [("gpt2", "opt_projections"), ("opt_projections", "llama"), ("llama", "llama")]
)
def test_options_equal_the_dense_loss(pair, options):
    config = FDDConfig.paper(**({"num_layers": 3, "ce_weight": 0.5} | options))
    compare_with_dense(*models(*pair), tiny_batch(), config, rtol=1e-6, atol=1e-8)


def test_without_labels_every_attended_position_is_valid():
    config = FDDConfig.paper(num_layers=3)
    batch = tiny_batch(labels=False)
    terms = compare_with_dense(*models(), batch, config, rtol=1e-6, atol=1e-8)
    # Padding tokens have no influence, the last attended position has one.
    student, teacher = models()
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][-1, -1] = 5
    torch.testing.assert_close(Distiller(student, teacher, config)(other).loss, terms.loss)
    other["input_ids"][0, -1] += 1
    assert abs(Distiller(student, teacher, config)(other).loss - terms.loss) > 1e-4


def test_without_mask_and_labels_every_position_is_valid():
    batch = tiny_batch(labels=False)
    batch["attention_mask"][:] = 1
    distiller = Distiller(*models(), FDDConfig.paper(num_layers=3))
    torch.testing.assert_close(
        distiller({"input_ids": batch["input_ids"]}).loss, distiller(batch).loss
    )


@pytest.mark.parametrize("labels", [True, False])
def test_count_positions_is_the_divisor_of_the_mean(labels):
    batch = tiny_batch(labels=labels)
    distiller = Distiller(*models(), FDDConfig.paper(num_layers=3))
    total = distiller(batch, num_items_in_batch=1).loss
    torch.testing.assert_close(total / distiller.count_positions(batch), distiller(batch).loss)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    ("pair", "dtype"),
    [(("gpt2", "gpt2"), torch.float64), (("llama", "opt_projections"), torch.float32)],
)
def test_padding_on_the_left_equals_the_right_and_none(pair, dtype, labels):
    """The first token of a sequence may have a label; the padding before it does not predict it."""
    student, teacher = models(*pair, dtype=dtype)
    config = FDDConfig.paper(num_layers=3, ce_weight=0.5 if labels else 0.0)
    distiller = Distiller(student, teacher, config)
    right = tiny_batch(rows=3, length=9, labels=labels)
    right["attention_mask"][1, 4:] = 0
    if labels:
        right["labels"][1, 4:] = -100
    left = pad_left(right)
    lengths = right["attention_mask"].sum(1).tolist()
    alone = [
        {key: value[row : row + 1, :length] for key, value in right.items()}
        for row, length in enumerate(lengths)
    ]
    count = distiller.count_positions(right)
    # the last tokens, and two more of the prompt
    assert int(count) == sum(lengths) - (3 + 2 if labels else 0)
    assert distiller.count_positions(left) == count
    assert sum(distiller.count_positions(batch) for batch in alone) == count

    def run(batches):
        student.zero_grad()
        terms = [
            distiller(batch, num_items_in_batch=count if len(batches) > 1 else None)
            for batch in batches
        ]
        sum(t.loss for t in terms).backward()
        return torch.stack([torch.stack(t).detach() for t in terms]).sum(0), gradients(student)

    # Sums of at most 9 x 97 equal addends in another order: 2 x 873 x half a unit in the last
    # place.
    budget = 873 * torch.finfo(dtype).eps
    wanted, expected = run([right])
    assert wanted[: 5 if labels else 4].min() > 0.01
    for batches in ([left], alone):
        found, gradient = run(batches)
        torch.testing.assert_close(found, wanted, rtol=budget, atol=0)
        for name, g in expected.items():
            torch.testing.assert_close(
                gradient[name], g, rtol=0, atol=budget * float(g.abs().max()), msg=name
            )
    # Padding tokens have no influence.
    other = dict(
        left, input_ids=left["input_ids"].where(left["attention_mask"] == 1, torch.tensor(7))
    )
    torch.testing.assert_close(run([other])[0], wanted, rtol=budget, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_equal_rows_of_their_own(masked):
    """Two sequences in one row, told apart by position_ids (and by a mask of blocks): none sees or
    predicts the other.
    """
    student, teacher = (
        tiny_model("llama", seed=1, dtype=torch.float64),
        tiny_model("llama", seed=2, dtype=torch.float64),
    )
    batch = tiny_batch(labels=False)
    lengths = batch["attention_mask"].sum(1).tolist()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    pieces = [row[:length] for row, length in zip(batch["input_ids"], lengths)]
    labels = [torch.cat([torch.tensor([-100]), piece[1:]]) for piece in pieces]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = {
        "input_ids": torch.cat(pieces)[None],
        "position_ids": positions,
        "labels": torch.cat(labels)[None],
    }
    if masked:
        own = torch.block_diag(*(torch.ones(length, length) for length in lengths)).tril().bool()
        packed["attention_mask"] = torch.zeros(own.shape, dtype=torch.float64).masked_fill(
            ~own, -1e30
        )[None, None]
    distiller = Distiller(student, teacher, CONFIG)
    torch.testing.assert_close(
        torch.stack(list(distiller(packed))),
        torch.stack(list(distiller(batch))),
        rtol=1e-6,
        atol=1e-9,
    )


def test_other_attention_masks_say_nothing_of_padding():
    student, teacher = models()
    distiller, batch = Distiller(student, teacher, CONFIG), tiny_batch()
    wanted = distiller(batch).loss
    seen = torch.ones(9, 9).tril() * batch["attention_mask"][:, None, None, :]
    four = dict(
        batch,
        attention_mask=torch.zeros(2, 1, 9, 9, dtype=torch.float64).masked_fill(seen == 0, -1e9),
    )
    assert distiller.count_positions(four) == distiller.count_positions(batch)
    torch.testing.assert_close(distiller(four).loss, wanted, rtol=1e-6, atol=0)
    del four["labels"]
    with pytest.raises(ValueError, match=r"not of the shape \(2, 9\) .*or labels, with -100"):
        Distiller(student, teacher, FDDConfig.paper(num_layers=3))(four)


@pytest.mark.parametrize("labels", [True, False])
def test_shift_labels_are_taken_as_given(labels):
    """Beside labels or instead of them; position t is compared with shift_labels[t]."""
    student, teacher = models()
    batch = tiny_batch()
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    terms = Distiller(student, teacher, CONFIG)(batch)
    given = batch | {"shift_labels": shifted, "labels": torch.full_like(shifted, 5)}
    if not labels:
        del given["labels"]
    distiller = Distiller(student, teacher, CONFIG)
    assert distiller.count_positions(given) == distiller.count_positions(batch)
    for found, expected in zip(distiller(given), terms, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # The first half of each sequence knows the label after its end.
    half = {name: tensor[:, :5] for name, tensor in given.items()}
    assert distiller.count_positions(half) == (shifted[:, :5] != -100).sum()
    with torch.no_grad():
        logits, states = student(half["input_ids"]).logits, distiller.teacher_states(half)
    ce = F.cross_entropy(logits.flatten(0, 1), half["shift_labels"].flatten())
    torch.testing.assert_close(
        distiller(half, teacher_states=states).ce.detach(), ce, rtol=1e-5, atol=0, check_dtype=False
    )
    with pytest.raises(ValueError, match=r"shift_labels has shape \(2, 9\)"):
        distiller(half | {"shift_labels": shifted})


def test_token_weights_belong_to_positions_and_are_not_shifted():
    """The weight of position t is that of the prediction of token t + 1, in every term."""
    batch, (student, teacher) = tiny_batch(), models()
    distiller = Distiller(student, teacher, CONFIG)
    count = distiller.count_positions(batch)
    valid = valid_positions(batch, -100)
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(valid.shape, generator=generator, dtype=torch.float64)
    found = distiller(batch | {"token_weights": weights})
    assert distiller.count_positions(batch | {"token_weights": weights}) == count
    total = [0.0] * len(found)
    for row, position in valid.nonzero().tolist():
        labels = torch.full_like(batch["labels"], -100)
        labels[row, position + 1] = batch["labels"][row, position + 1]
        alone = distiller(batch | {"labels": labels}, num_items_in_batch=count)
        weight = float(weights[row, position])
        total = [t + weight * term.detach() for t, term in zip(total, alone)]
    for name, term, expected in zip(found._fields, found, total):
        torch.testing.assert_close(term.detach(), expected, msg=lambda m, n=name: f"{n}: {m}")


def test_positions_of_weight_0_have_no_influence():
    batch, (student, teacher) = tiny_batch(), models()
    distiller = Distiller(student, teacher, CONFIG)
    count = distiller.count_positions(batch)
    weights = torch.ones(batch["input_ids"].shape)
    weights[0, -3:] = 0.0
    labels = batch["labels"].clone()
    labels[0, -2:] = -100
    distiller(batch | {"token_weights": weights}).loss.backward()
    found = gradients(student)
    student.zero_grad()
    distiller(batch | {"labels": labels}, num_items_in_batch=count).loss.backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_positions_without_labels_have_no_influence():
    batch = tiny_batch()
    batch["labels"][:] = -100
    batch["labels"][0, 4] = 7
    student, teacher = models()
    loss = Distiller(student, teacher, CONFIG)(batch).loss
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][0, 4:] = 3  # the state at position 3 sees none of these
    other["input_ids"][1] = 4
    torch.testing.assert_close(Distiller(student, teacher, CONFIG)(other).loss, loss)


def test_a_batch_without_a_label_gives_zero_and_no_nan():
    batch = tiny_batch()
    batch["labels"][:] = -100
    student, teacher = models()
    terms = Distiller(student, teacher, CONFIG)(batch)
    terms.loss.backward()
    assert terms.loss == 0
    assert all((g == 0).all() for g in gradients(student).values())


@pytest.mark.trap("final norm applied twice or never")
@pytest.mark.parametrize("apply_final_norm", [True, False])
def test_final_norm_is_applied_exactly_once(apply_final_norm):
    """The sampled layers go through it once each (or never), the output once."""
    student, teacher = models("llama", "gpt2")
    calls = {"student": 0, "teacher": 0}
    distiller = Distiller(
        student, teacher, FDDConfig.paper(num_layers=3, apply_final_norm=apply_final_norm)
    )

    def count(side, *_):
        calls[side] += 1

    student.model.norm.register_forward_hook(functools.partial(count, "student"))
    teacher.transformer.ln_f.register_forward_hook(functools.partial(count, "teacher"))
    distiller(tiny_batch())
    expected = 4 if apply_final_norm else 1
    assert calls == {"student": expected, "teacher": expected}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "phi_head_bias"])
def test_a_head_that_is_not_trained_gets_no_gradient_from_the_loss(family):
    student, teacher = models(family)
    Distiller(student, teacher, FDDConfig.paper(num_layers=3, train_head=False))(
        tiny_batch()
    ).loss.backward()
    if family == "llama_tied":
        # The embeddings still learn as inputs: rows of tokens in the batch have a gradient.
        touched = student.lm_head.weight.grad.abs().sum(-1) > 0
        occurring = torch.zeros(VOCAB, dtype=torch.bool)
        occurring[tiny_batch()["input_ids"].flatten()] = True
        assert touched.any()
        assert not (touched & ~occurring).any()
    else:
        assert student.lm_head.weight.grad is None
        assert getattr(student.lm_head, "bias", None) is None or student.lm_head.bias.grad is None
    assert student.get_input_embeddings().weight.grad is not None


def test_a_frozen_head_gets_no_gradient():
    student, teacher = models("llama")
    student.lm_head.requires_grad_(False)
    Distiller(student, teacher, CONFIG)(tiny_batch()).loss.backward()
    assert student.lm_head.weight.grad is None
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_tied_head_collects_both_gradients():
    student, teacher = models("llama_tied")
    Distiller(student, teacher, CONFIG)(tiny_batch()).loss.backward()
    assert student.lm_head.weight is student.get_input_embeddings().weight
    assert (student.lm_head.weight.grad.abs().sum(-1) > 0).all()


def test_lora_student():
    """Only adapters learn, with the gradients of the dense loss; the merged model gives the same
    loss.
    """
    student, teacher = models("llama")
    lora = peft.get_peft_model(
        student, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    lora.double()
    distiller = Distiller(lora, teacher, CONFIG)
    terms = distiller(tiny_batch())
    terms.loss.backward()
    actual = gradients(lora)
    assert actual
    assert all("lora_" in name for name in actual)
    lora.zero_grad()
    expected = dense_terms(student, teacher, tiny_batch())
    expected.loss.backward()
    torch.testing.assert_close(terms.loss, expected.loss, rtol=1e-6, atol=1e-8)
    for name, gradient in gradients(lora).items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-8)
    merged = Distiller(lora.merge_and_unload(), teacher, CONFIG)(tiny_batch())
    torch.testing.assert_close(merged.loss, terms.loss, rtol=1e-5, atol=1e-7)


def test_mixed_dtypes_and_autocast():
    """A bfloat16 teacher and a float32 student: only the models round, with autocast or without."""
    student, teacher = models(dtype=torch.float32)
    teacher.to(torch.bfloat16)
    compare_with_dense(student, teacher, tiny_batch(), rtol=2e-4, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        terms = Distiller(student, teacher, CONFIG)(tiny_batch())
        expected = dense_terms(student, teacher, tiny_batch())
    for name, term, value in zip(terms._fields, terms, expected):
        assert term.dtype == torch.float32
        assert float(term) == pytest.approx(float(value), rel=1e-5), name
    terms.loss.backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(student).values())


def test_teacher_layers_of_another_number():
    """The trajectory is linear in the weights of pairs; one teacher layer each is that layer."""
    batch, layers = tiny_batch(), {"student_layers": (1, 3), "teacher_layers": (2, 4, 6)}

    def outcome(**options):
        student, teacher = models()
        terms = Distiller(student, teacher, FDDConfig.paper(**options))(batch)
        (terms.trajectory + terms.derivative).backward()
        return [terms.trajectory, terms.derivative, *gradients(student).values()]

    def weighted(*weights):
        return outcome(layer_weights=weights, derivative_layers=(0, 2), **layers)

    by_rank = outcome(student_layers=(1, 3), teacher_layers=(2, 6))
    first, second = weighted((1, 0, 0), (0, 0, 1)), weighted((0, 1, 0), (0, 0, 1))
    for a, b in zip(first, by_rank):
        torch.testing.assert_close(a, b)
    for a, b, c in zip(weighted((0.25, 0.75, 0), (0, 0, 1)), first, second):
        torch.testing.assert_close(a, 0.25 * b + 0.75 * c)
    assert abs(first[0] - second[0]) > 1e-3
