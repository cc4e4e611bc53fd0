"""Distiller and its models: vocabularies, changed heads, hooks, modes, checkpointing, training."""

import functools

import peft
import pytest
import torch
from torch import nn

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.hf.teachers import LiveTeacher, Teacher, TeacherWithHead
from tests.support.dense import CONFIG, compare_with_dense, gradients, models
from tests.support.hf_models import VOCAB, tiny_batch, tiny_model


class TestVocabularies:
    def test_padded_vocabulary_equals_the_dense_loss_over_the_common_tokens(self):
        student = tiny_model("llama", depth=4, seed=1, dtype=torch.float64, vocab_size=VOCAB + 31)
        teacher = tiny_model("gpt2", depth=8, seed=2, dtype=torch.float64)
        config = FDDConfig.paper(num_layers=3, vocab_size=VOCAB - 5)
        compare_with_dense(
            student, teacher, tiny_batch(vocab_size=VOCAB - 5), config, rtol=1e-6, atol=1e-8
        )

    def test_rows_beyond_the_common_tokens_get_no_gradient(self):
        student = tiny_model("llama", depth=4, seed=1, vocab_size=VOCAB + 31)
        teacher = tiny_model("gpt2", depth=8, seed=2)
        config = FDDConfig.paper(num_layers=3, vocab_size=VOCAB)
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
    config = FDDConfig.paper(num_layers=3, ce_weight=0.5, vocab_size=VOCAB)
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
    output_only = Distiller(student, teacher, FDDConfig.paper(num_layers=3, alpha=0.0, beta=0.0))
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


def test_a_replaced_teacher_gives_both_targets_and_head():
    student, teacher = models()
    other = tiny_model("gpt2", depth=8, seed=7, dtype=torch.float64)
    distiller, batch = Distiller(student, teacher, CONFIG), tiny_batch()
    before, expected = distiller(batch), Distiller(student, other, CONFIG)(batch)
    assert abs(before.loss - expected.loss) > 1e-3
    distiller.teacher = LiveTeacher(other)
    torch.testing.assert_close(torch.stack(distiller(batch)), torch.stack(expected))


def test_names_of_a_teacher_in_earlier_releases():
    teacher = LiveTeacher(models()[1])
    assert isinstance(teacher, TeacherWithHead)
    assert not isinstance(models()[0], Teacher | TeacherWithHead)
    with pytest.warns(DeprecationWarning, match=r"lens is now \.reader"):
        assert teacher.lens is teacher.reader


def test_config_overrides_the_models_soft_cap_and_scale():
    student, teacher = models("gemma2", "granite")
    options = Distiller(
        student,
        teacher,
        FDDConfig.paper(num_layers=3, student_softcap=7.0, teacher_logit_scale=2.0),
    ).options
    assert (options.student_softcap, options.teacher_softcap) == (7.0, None)
    assert (options.student_logit_scale, options.teacher_logit_scale) == (1.0, 2.0)


def test_too_shallow_models_are_named():
    with pytest.raises(ValueError, match="deeper model: one of depth 2"):
        Distiller(tiny_model("llama", depth=2), tiny_model("gpt2", depth=8))


def test_distillation_lowers_held_out_kl():
    """Fifty steps on random text: the KL to the teacher on other text falls to less than half."""
    teacher = tiny_model("gpt2", depth=3, seed=2, spread=2.0)
    student = tiny_model("llama", depth=3, seed=5)
    distiller = Distiller(student, teacher, FDDConfig.paper(num_layers=2))
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
