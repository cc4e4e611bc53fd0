"""Distiller against dense computations written by hand from the models' own hidden states and
logits.
"""

import functools

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdd_kernels import Distiller, FDDConfig, FDDLossTerms
from tests.support.hf_models import VOCAB, pad_left, tiny_batch, tiny_model

STUDENT_LAYERS, TEACHER_LAYERS = (1, 2, 3), (2, 4, 6)
CONFIG = FDDConfig(num_layers=3, ce_weight=0.5, alpha=0.7, beta=1.3, output_kd_weight=0.9)


def final_norm(model: nn.Module):
    """Return a function that applies the family's final norm, and the projection before the
    head.
    """
    names = {
        "gpt2": "transformer.ln_f",
        "llama": "model.norm",
        "gemma2": "model.norm",
        "granite": "model.norm",
    }
    if model.config.model_type == "opt":
        decoder = model.model.decoder
        return lambda h, norm=True: decoder.project_out(decoder.final_layer_norm(h) if norm else h)
    module = model.get_submodule(names[model.config.model_type])
    return lambda h, norm=True: module(h) if norm else h


def logits_of(model: nn.Module, state: Tensor, *, train_head: bool = True) -> Tensor:
    """Apply the head, scale and soft cap in float64, from the config fields of the families here.

    Under autocast operands are rounded to bfloat16 first, and logits still are not.
    """
    head = model.get_output_embeddings()
    operands = [state, head.weight, *([] if head.bias is None else [head.bias])]
    if not train_head:
        operands[1:] = [t.detach() for t in operands[1:]]
    if torch.is_autocast_enabled("cpu"):
        operands = [t.bfloat16() for t in operands]
    with torch.autocast("cpu", enabled=False):
        logits = F.linear(*[t.double() for t in operands])
    logits = logits / (getattr(model.config, "logits_scaling", None) or 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def dense_terms(
    student,
    teacher,
    batch,
    config=CONFIG,
    student_layers=STUDENT_LAYERS,
    teacher_layers=TEACHER_LAYERS,
):
    """The paper's loss from output_hidden_states and logits, position by position."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def log_probabilities(model, layers, train_head=True):
        output = model(**inputs, output_hidden_states=True)
        read = final_norm(model)
        lens = [
            logits_of(
                model, read(output.hidden_states[k], config.apply_final_norm), train_head=train_head
            )
            for k in layers
        ]
        final = output.hidden_states[-1]
        if model.config.model_type == "opt":
            final = (
                model.model.decoder.project_out(final)
                if final.shape[-1] != model.lm_head.in_features
                else final
            )
        final_logits = logits_of(model, final, train_head=train_head)
        rounding = 8 * torch.finfo(output.logits.dtype).eps + 1e-6
        torch.testing.assert_close(
            final_logits, output.logits.double(), rtol=rounding, atol=rounding
        )
        return [z[..., : config.vocab_size].log_softmax(-1) for z in lens], final_logits

    ours, our_logits = log_probabilities(student, student_layers, config.train_head)
    with torch.no_grad():
        theirs, their_logits = log_probabilities(teacher, teacher_layers)
    if "labels" in batch:
        counts = torch.zeros_like(batch["labels"], dtype=torch.bool)
        counts[:, :-1] = batch["labels"][:, 1:] != -100
    else:
        counts = batch["attention_mask"].bool()

    def mean(per_position: Tensor) -> Tensor:
        return per_position[counts].mean()

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return mean((log_p.exp() * (log_p - log_q)).sum(-1))

    trajectory = sum(kl(t, s) for s, t in zip(ours, theirs)) / len(ours)
    pairs = [(ours[i + 1] - ours[i], theirs[i + 1] - theirs[i]) for i in range(len(ours) - 1)]
    derivative = sum(mean(1 - F.cosine_similarity(s, t, dim=-1)) for s, t in pairs) / len(pairs)
    output_kd = kl(
        their_logits[..., : config.vocab_size].log_softmax(-1),
        our_logits[..., : config.vocab_size].log_softmax(-1),
    )
    ce = our_logits.new_zeros(())
    if config.ce_weight:
        ce = F.cross_entropy(our_logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss = (
        config.output_kd_weight * output_kd
        + config.alpha * trajectory
        + config.beta * derivative
        + config.ce_weight * ce
    )
    return FDDLossTerms(loss, output_kd, trajectory, derivative, ce)


def models(student="llama", teacher="gpt2", dtype=torch.float64, **student_options):
    """A student of 4 blocks and a teacher of 8."""
    ours = tiny_model(student, depth=4, seed=1, dtype=dtype, **student_options)
    theirs = tiny_model(teacher, depth=8, seed=2, dtype=dtype)
    return ours, theirs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare_with_dense(student, teacher, batch, config=CONFIG, **tolerance):
    """Terms and every gradient of the student against `dense_terms`."""
    distiller = Distiller(student, teacher, config)
    student.train()
    terms = distiller(batch)
    terms.loss.backward()
    actual = gradients(student)
    student.zero_grad()
    expected_terms = dense_terms(student, teacher, batch, config)
    expected_terms.loss.backward()
    expected = gradients(student)
    student.zero_grad()
    for name in FDDLossTerms._fields:
        torch.testing.assert_close(
            getattr(terms, name),
            getattr(expected_terms, name),
            **tolerance,
            check_dtype=False,
            msg=lambda m, n=name: n + m,
        )
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any(g.abs().max() > 1e-4 for g in actual.values())
    return terms


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
    config = FDDConfig(**({"num_layers": 3, "ce_weight": 0.5} | options))
    compare_with_dense(*models(*pair), tiny_batch(), config, rtol=1e-6, atol=1e-8)


def test_without_labels_every_attended_position_is_valid():
    config = FDDConfig(num_layers=3)
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
    distiller = Distiller(*models(), FDDConfig(num_layers=3))
    torch.testing.assert_close(
        distiller({"input_ids": batch["input_ids"]}).loss, distiller(batch).loss
    )


@pytest.mark.parametrize("labels", [True, False])
def test_count_positions_is_the_divisor_of_the_mean(labels):
    batch = tiny_batch(labels=labels)
    distiller = Distiller(*models(), FDDConfig(num_layers=3))
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
    config = FDDConfig(num_layers=3, ce_weight=0.5 if labels else 0.0)
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
        Distiller(student, teacher, FDDConfig(num_layers=3))(four)


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
        student, teacher, FDDConfig(num_layers=3, apply_final_norm=apply_final_norm)
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
    Distiller(student, teacher, FDDConfig(num_layers=3, train_head=False))(
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


class TestVocabularies:
    def test_padded_vocabulary_equals_the_dense_loss_over_the_common_tokens(self):
        student = tiny_model("llama", depth=4, seed=1, dtype=torch.float64, vocab_size=VOCAB + 31)
        teacher = tiny_model("gpt2", depth=8, seed=2, dtype=torch.float64)
        config = FDDConfig(num_layers=3, vocab_size=VOCAB - 5)
        compare_with_dense(
            student, teacher, tiny_batch(vocab_size=VOCAB - 5), config, rtol=1e-6, atol=1e-8
        )

    def test_rows_beyond_the_common_tokens_get_no_gradient(self):
        student = tiny_model("llama", depth=4, seed=1, vocab_size=VOCAB + 31)
        teacher = tiny_model("gpt2", depth=8, seed=2)
        config = FDDConfig(num_layers=3, vocab_size=VOCAB)
        Distiller(student, teacher, config)(tiny_batch()).loss.backward()
        assert (student.lm_head.weight.grad[:VOCAB].abs().sum(-1) > 0).all()
        assert (student.lm_head.weight.grad[VOCAB:] == 0).all()

    def test_different_vocabularies_need_a_number(self):
        student, teacher = tiny_model("llama", vocab_size=128), tiny_model("gpt2")
        with pytest.raises(
            ValueError, match=r"128 entries and the teacher's 97.*vocab_size=N.*<= 97"
        ):
            Distiller(student, teacher)


def lora_on_the_head(student):
    student = peft.get_peft_model(
        student, peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        student.base_model.model.lm_head.lora_B.default.weight.normal_()
    return student


def new_head(student):
    head = nn.Linear(student.config.hidden_size, VOCAB, bias=False, dtype=student.dtype)
    student.set_output_embeddings(head)
    return student


@pytest.mark.parametrize(
    "change", [lora_on_the_head, new_head, lambda s: (s.resize_token_embeddings(VOCAB + 6), s)[1]]
)
def test_a_head_that_was_changed_after_the_distiller_was_made_is_the_one_read(change):
    student, teacher = models()
    config = FDDConfig(num_layers=3, ce_weight=0.5, vocab_size=VOCAB)
    distiller, batch = Distiller(student, teacher, config), tiny_batch()
    changed = change(student)
    terms = distiller(batch)
    terms.loss.backward()
    found = gradients(changed)
    changed.zero_grad()
    fresh = Distiller(changed, teacher, config)(batch)
    fresh.loss.backward()
    for one, other in zip(terms, fresh, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    expected = gradients(changed)
    assert found.keys() == expected.keys()
    assert any("lm_head" in name and gradient.any() for name, gradient in found.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


def test_vocabularies_that_no_longer_fit_are_refused():
    student, teacher = models()
    distiller = Distiller(student, teacher, CONFIG)
    student.resize_token_embeddings(VOCAB + 6)
    with pytest.raises(ValueError, match="vocab_size"):
        distiller(tiny_batch())
    teacher.resize_token_embeddings(VOCAB + 6)
    assert distiller(tiny_batch()).loss.isfinite()


def test_own_logits_are_never_computed():
    student, teacher = models()
    distiller = Distiller(student, teacher, CONFIG)

    def refuse(*_args, **_kwargs):
        raise AssertionError("the head was called")

    student.lm_head.forward = teacher.lm_head.forward = refuse
    student.forward = teacher.forward = refuse
    assert distiller(tiny_batch()).loss.isfinite()


def test_no_hook_is_left_behind():
    student, teacher = models()
    distiller = Distiller(student, teacher, CONFIG)

    def hooks():
        return [
            len(m._forward_hooks) + len(m._forward_pre_hooks)
            for model in (student, teacher)
            for m in model.modules()
        ]

    assert not any(hooks())
    distiller(tiny_batch())
    assert not any(hooks())
    student.model.layers[3].forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        distiller(tiny_batch())
    assert not any(hooks())


def test_teacher_stays_in_evaluation_mode_and_gets_no_gradient():
    student, teacher = models()
    teacher.train()
    distiller = Distiller(student, teacher, CONFIG)
    assert not teacher.training
    teacher.train()  # as a user's loop may do
    distiller(tiny_batch()).loss.backward()
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(state.requires_grad for state in distiller.teacher_states(tiny_batch()))


def test_student_keeps_its_mode():
    student, teacher = models()
    student.train()
    distiller = Distiller(student, teacher, CONFIG)
    distiller(tiny_batch())
    assert all(module.training for module in student.modules())


def checkpoint_by_transformers(reentrant: bool):
    return lambda student: student.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )


def checkpoint_around_hooks(student):
    """Reentrant checkpointing around a block and its hooks, as transformers had it before 5.x."""

    class Reentrant(type(student.model.layers[0])):
        def __call__(self, state, **kwargs):
            return torch.utils.checkpoint.checkpoint(
                functools.partial(super().__call__, **kwargs), state, use_reentrant=True
            )

    for block in student.model.layers:
        block.__class__ = Reentrant


@pytest.mark.parametrize(
    ("family", "enable"),
    [
        ("llama", checkpoint_by_transformers(False)),
        ("gpt2", checkpoint_by_transformers(False)),
        ("llama", checkpoint_by_transformers(True)),
        ("llama", checkpoint_around_hooks),
    ],
)
def test_gradient_checkpointing_changes_nothing(family, enable):
    student, teacher = models(family)
    student.train()
    distiller = Distiller(student, teacher, CONFIG)
    distiller(tiny_batch()).loss.backward()
    expected = gradients(student)
    student.zero_grad()
    computed = 0

    def count(*_):
        nonlocal computed
        computed += 1

    distiller.student.blocks[1].mlp.register_forward_pre_hook(count)
    enable(student)
    distiller(tiny_batch()).loss.backward()
    assert computed == 2
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    assert gradients(student).keys() == expected.keys()


def test_states_that_lost_their_gradient_are_refused():
    student, teacher = models()
    distiller = Distiller(student, teacher, CONFIG)
    block = student.model.layers[1]
    block.forward = torch.no_grad()(block.forward)
    with pytest.raises(
        RuntimeError, match=r"student: the states of layers \[2\] carry no gradient.*use_reentrant"
    ):
        distiller(tiny_batch())
    with torch.no_grad():
        assert distiller(tiny_batch()).loss.isfinite()


def test_checkpointing_with_frozen_first_blocks_is_no_error():
    student, teacher = models()
    student.requires_grad_(False)
    student.model.layers[3].requires_grad_(True)
    student.train()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    Distiller(student, teacher, CONFIG)(tiny_batch()).loss.backward()
    assert set(gradients(student)) == {
        name for name, p in student.named_parameters() if p.requires_grad
    }


def test_teacher_states_can_be_shared():
    student, teacher = models()
    distiller = Distiller(student, teacher, CONFIG)
    output_only = Distiller(student, teacher, FDDConfig(num_layers=3, alpha=0.0, beta=0.0))
    batch = tiny_batch()
    states = distiller.teacher_states(batch)
    expected = distiller(batch), output_only(batch)
    teacher.forward = teacher.model = None
    distiller.teacher.reader.backbone.forward = lambda **_: 1 / 0
    for actual, wanted in zip(
        (distiller(batch, teacher_states=states), output_only(batch, teacher_states=states)),
        expected,
    ):
        torch.testing.assert_close(torch.stack(actual), torch.stack(wanted))


def test_config_overrides_the_models_soft_cap_and_scale():
    student, teacher = models("gemma2", "granite")
    options = Distiller(
        student, teacher, FDDConfig(num_layers=3, student_softcap=7.0, teacher_logit_scale=2.0)
    ).options
    assert (options.student_softcap, options.teacher_softcap) == (7.0, None)
    assert (options.student_logit_scale, options.teacher_logit_scale) == (1.0, 2.0)


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


def test_too_shallow_models_are_named():
    with pytest.raises(ValueError, match="deeper model: one of depth 2"):
        Distiller(tiny_model("llama", depth=2), tiny_model("gpt2", depth=8))


def test_distillation_lowers_held_out_kl():
    """Fifty steps on random text: the KL to the teacher on other text falls to less than half."""
    teacher = tiny_model("gpt2", depth=3, seed=2, spread=2.0)
    student = tiny_model("llama", depth=3, seed=5)
    distiller = Distiller(student, teacher, FDDConfig(num_layers=2))
    train = [tiny_batch(rows=8, length=16, seed=10 + i, labels=False) for i in range(10)]
    held_out = tiny_batch(rows=16, length=16, seed=99, labels=False)

    @torch.no_grad()
    def held_out_kl():
        log_p, log_q = (model(**held_out).logits.log_softmax(-1) for model in (teacher, student))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return float(kl[held_out["attention_mask"].bool()].mean())

    before = held_out_kl()
    with torch.no_grad():
        assert float(distiller(held_out).output_kd) == pytest.approx(before, rel=1e-4)
    optimizer = torch.optim.AdamW(student.parameters(), lr=4e-3)
    for step in range(50):
        distiller(train[step % len(train)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_kl()
    assert after < 0.5 * before, (before, after)
