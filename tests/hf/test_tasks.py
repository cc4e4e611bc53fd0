"""Masked LMs and encoder-decoders in the lens: their positions, labels and layers."""

import dataclasses

import peft
import pytest
import torch

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.hf.tasks import task_of
from fdd_kernels.teacher_cache import write_teacher_cache
from tests.support.dense import compare_with_dense, gradients
from tests.support.tasks import (
    FAMILIES,
    batch_of,
    dense_terms_of,
    pair,
    task_model,
)

CONFIG = FDDConfig.paper(num_layers=2, ce_weight=0.5, alpha=0.7, beta=1.3, output_kd_weight=0.9)
LAYERS = (1, 2), (2, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_dense_loss(family):
    compare_with_dense(
        *pair(family),
        batch_of(family),
        CONFIG,
        dense=dense_terms_of(family, *LAYERS),
        rtol=1e-6,
        atol=1e-8,
    )


class TestMaskedLMs:
    def test_labels_are_those_of_their_own_positions(self):
        batch = batch_of("bert")
        distiller = Distiller(*pair("bert"), CONFIG)
        valid = batch["labels"] != -100
        assert distiller.count_positions(batch) == valid.sum()
        shifted = {**batch, "shift_labels": batch["labels"]}
        del shifted["labels"]
        assert torch.equal(distiller(shifted).loss, distiller(batch).loss)

    def test_labels_are_needed(self):
        batch = batch_of("bert")
        del batch["labels"]
        with pytest.raises(ValueError, match=r"no labels.*DataCollatorForLanguageModeling"):
            Distiller(*pair("bert"), CONFIG)(batch)

    def test_rows_that_repeat_are_left_out(self):
        batch, distiller = batch_of("bert"), Distiller(*pair("bert"), CONFIG)
        first = {key: value[:1] for key, value in batch.items()}
        cut = distiller.without_rows_from(batch, 1)
        torch.testing.assert_close(distiller(cut).loss, distiller(first).loss)

    def test_a_masked_lm_that_is_a_decoder_is_a_causal_lm(self):
        assert task_of(task_model("bert", is_decoder=True)).name == "causal_lm"

    def test_shared_blocks_run_no_more_often_than_is_asked_for(self):
        student, teacher = pair("albert")
        config = FDDConfig.paper(student_layers=(0, 2), teacher_layers=(0, 4), output_kd_weight=0.0)
        distiller, calls = Distiller(student, teacher, config), []
        assert distiller.student.depth == 4
        (group,) = student.albert.encoder.albert_layer_groups
        with group.register_forward_hook(lambda *_: calls.append(1)):
            terms = distiller(batch_of("albert"))
        assert len(calls) == 2
        terms.loss.backward()
        idle = distiller.parameters_without_gradient()
        assert not [name for name in idle if "albert_layer_groups" in name]
        assert all(p.grad is not None for p in group.parameters())

    @pytest.mark.parametrize("family", ["bert", "albert", "roberta"])
    def test_a_bias_that_the_transform_holds_too_is_named_without_gradient(self, family):
        student, teacher = pair(family)
        for changes in ({"train_head": False}, {"space": "feature", "trajectory": "mse"}):
            config = FDDConfig(num_layers=2, output_kd_weight=0.0, **changes)
            distiller = Distiller(student, teacher, config)
            student.zero_grad()
            distiller(batch_of(family)).loss.backward()
            without = [name for name, p in student.named_parameters() if p.grad is None]
            assert distiller.parameters_without_gradient() == without
            assert [name for name in without if name.endswith("bias")]


class TestEncoderDecoders:
    @pytest.mark.parametrize("family", ["t5", "bart"])
    def test_decoder_tokens_are_the_models_own(self, family):
        batch, (student, teacher) = batch_of(family), pair(family)
        distiller = Distiller(student, teacher, CONFIG)
        ids = student.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        given = {**batch, "decoder_input_ids": ids}
        assert torch.equal(distiller(given).loss, distiller(batch).loss)
        other = {**given, "decoder_input_ids": torch.where(ids == ids[0, 1], 5, ids)}
        assert distiller(other).loss != distiller(batch).loss

    def test_positions_are_the_decoders(self):
        batch, distiller = batch_of("t5"), Distiller(*pair("t5"), CONFIG)
        assert distiller.count_positions(batch) == (batch["labels"] != -100).sum()
        more = {**batch, "decoder_attention_mask": torch.ones_like(batch["labels"])}
        more["decoder_attention_mask"][:, 0] = 0
        assert distiller.count_positions(more) == distiller.count_positions(batch) - 2
        unlabelled = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "decoder_input_ids": batch["labels"].clamp(min=0),
        }
        assert distiller.count_positions(unlabelled) == batch["labels"].numel()
        cut = distiller.without_rows_from(batch, 1)
        first = {key: value[:1] for key, value in batch.items()}
        torch.testing.assert_close(distiller(cut).loss, distiller(first).loss)

    def test_the_encoder_runs_once(self):
        student, teacher = pair("bart")
        distiller, calls = Distiller(student, teacher, CONFIG), []
        for model in (student, teacher):
            model.get_encoder().register_forward_hook(lambda m, *_: calls.append(m))
        distiller(batch_of("bart"))
        assert calls == [teacher.get_encoder(), student.get_encoder()]

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"labels": None}, "neither labels nor decoder_input_ids.*DataCollatorForSeq2Seq"),
            ({"encoder_outputs": (torch.zeros(2, 7, 32),)}, "encoder_outputs, which are one model"),
            ({"labels": torch.ones(3, 5).long()}, "2 rows of tokens and 3 of labels"),
            (
                {"decoder_input_ids": torch.ones(2, 4).long()},
                r"labels has shape \(2, 5\), but decoder_input_ids is of \(2, 4\)",
            ),
            (
                {"decoder_attention_mask": torch.ones(2, 7)},
                r"decoder_attention_mask has shape \(2, 7\), but decoder_input_ids is of \(2, 5\)",
            ),
            ({"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\), but input"),
            ({"token_weights": torch.ones(2, 7)}, r"token_weights has shape \(2, 7\), but decoder"),
            ({"labels": torch.full((2, 5), 98)}, "decoder_input_ids contains 98, but the teacher"),
        ],
    )
    def test_bad_batches(self, changes, match):
        batch = batch_of("t5") | changes
        with pytest.raises(ValueError, match=match):
            Distiller(*pair("t5"), CONFIG)(batch)

    def test_both_start_with_the_same_token(self):
        student, teacher = pair("bart")
        teacher.config.decoder_start_token_id = 3
        with pytest.raises(
            ValueError,
            match=r"student .BartF.* makes .* \[2, 5, 6\] and the teacher .* \[3, 5, 6\].*to the "
            r"teacher's \(3\)",
        ):
            Distiller(student, teacher, CONFIG)

    def test_without_a_start_token_every_batch_has_decoder_tokens(self):
        student, teacher = pair("t5")
        student.config.decoder_start_token_id = None
        distiller, batch = Distiller(student, teacher, CONFIG), batch_of("t5")
        with pytest.raises(ValueError, match=r"T5For.* cannot make decoder_input_ids from labels"):
            distiller(batch)
        batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
        assert distiller(batch).loss.isfinite()


class TestChangedStudents:
    def require_same(self, family: str, change) -> None:
        """Loss and gradients do not depend on `change` of the student."""
        found = []
        for changed in (False, True):
            student, teacher = pair(family)
            student.train()
            model = change(student) if changed else student
            terms = Distiller(model, teacher, CONFIG)(batch_of(family))
            terms.loss.backward()
            found.append((terms.loss, gradients(student)))
        (loss, expected), (other, grads) = found
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
        assert grads.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(grads[name], gradient, rtol=1e-10, atol=1e-12, msg=name)

    @pytest.mark.parametrize("family", ["bert", "t5"])
    def test_gradient_checkpointing(self, family):
        def enable(student):
            options = {"use_reentrant": False}
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            return student

        self.require_same(family, enable)

    @pytest.mark.parametrize("family", [pytest.param("albert", marks=pytest.mark.slow), "bart"])
    def test_compiled(self, family):
        self.require_same(family, lambda student: torch.compile(student, backend="eager"))

    @pytest.mark.parametrize(
        ("family", "targets", "task"),
        [("albert", ["query", "value"], None), ("t5", ["q", "v"], "SEQ_2_SEQ_LM")],
    )
    def test_lora(self, family, targets, task):
        (student, teacher), batch = pair(family), batch_of(family)
        expected = Distiller(student, teacher, CONFIG)(batch).loss
        config = peft.LoraConfig(r=2, target_modules=targets, task_type=task)
        adapted = peft.get_peft_model(student, config)
        terms = Distiller(adapted, teacher, CONFIG)(batch)
        torch.testing.assert_close(terms.loss, expected, rtol=1e-10, atol=0)  # B is 0 at first
        terms.loss.backward()
        trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        assert trained
        assert all(grad is not None for name, grad in trained.items() if "lora_B" in name)


def test_models_of_different_tasks():
    masked, (seq2seq, _) = task_model("bert"), pair("t5")
    with pytest.raises(
        TypeError, match=r"student \(BertF.* task masked_lm .* \(T5F.* task seq2seq_lm.*same class"
    ):
        Distiller(masked, seq2seq)
    with pytest.raises(TypeError, match=r"student .* task seq2seq_lm .* task masked_lm"):
        Distiller(seq2seq, masked)


def test_what_is_for_causal_lms_alone(tmp_path):
    student, teacher = pair("bert")
    with pytest.raises(TypeError, match=r"vocab_group is for causal LMs, .* task masked_lm"):
        Distiller(student, teacher, CONFIG, vocab_group=object())
    with pytest.raises(TypeError, match=r"a teacher cache is for causal LMs, .* task seq2seq_lm"):
        write_teacher_cache(tmp_path / "cache", pair("t5")[0], [], layers=[1])
    trl = pytest.importorskip("fdd_kernels.integrations.trl_sft")
    with pytest.raises(TypeError, match=r"FDDSFTTrainer is for causal LMs, .* task masked_lm"):
        trl.FDDSFTTrainer(student, teacher=teacher)


def dense_encoder_term(student, teacher, batch, config, layers, projection, norms):
    """Trajectory plus derivative of the encoders' states, sequence by sequence: the mean over a
    sequence's tokens counts as often as it has target tokens.
    """

    def states(model, of_model):
        encoder = model.get_encoder()
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        found = encoder(**inputs, output_hidden_states=True).hidden_states
        return [norms(encoder)(found[layer]) for layer in of_model]

    ours = [state @ projection.T for state in states(student, layers[0])]
    with torch.no_grad():
        theirs = states(teacher, layers[1])
    mask, targets = batch["attention_mask"].bool(), (batch["labels"] != -100).sum(1)

    def mean(per_token):
        rows = zip(per_token, mask, targets, strict=True)
        return sum(row[m].mean() * t for row, m, t in rows) / targets.sum()

    def cosine(s, t):
        return 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1)

    def mse(s, t):
        return (s - t).square().mean(-1)

    distance = {"mse": mse, "cosine": cosine}[config.encoder_trajectory]
    trajectory = sum(mean(distance(s, t)) for s, t in zip(ours, theirs)) / len(ours)
    return trajectory + mean(cosine(ours[1] - ours[0], theirs[1] - theirs[0]))


class TestEncoders:
    """`encoder_weight`: the encoders' states in feature space."""

    @pytest.mark.parametrize(
        ("family", "norms", "options"),
        [
            ("t5", lambda encoder: encoder.final_layer_norm, {}),
            ("t5", lambda encoder: lambda h: h, {"apply_final_norm": False}),
            ("bart", lambda encoder: lambda h: h, {"encoder_trajectory": "cosine"}),
        ],
    )
    def test_loss_and_gradients_equal_the_dense_loss(self, family, norms, options):
        (student, teacher), batch = pair(family), batch_of(family)
        plain = dataclasses.replace(CONFIG, **options)
        config = dataclasses.replace(plain, encoder_weight=0.6)
        distiller = Distiller(student, teacher, config)
        terms = distiller(batch)
        terms.loss.backward()
        parameters = {**dict(student.named_parameters()), "projection": distiller.projection.weight}
        found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None

        rest = Distiller(student, teacher, plain)(batch)
        assert rest.encoder is None
        # The encoders have 3 and 5 blocks.
        layers, weight = ((1, 2), (1, 2)), parameters["projection"]
        expected = dense_encoder_term(student, teacher, batch, config, layers, weight, norms)
        torch.testing.assert_close(terms.encoder, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(terms.loss, rest.loss + 0.6 * expected, rtol=1e-6, atol=0)
        (rest.loss + 0.6 * expected).backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-8, msg=name)

    def test_micro_batches_add_up(self):
        config = dataclasses.replace(CONFIG, encoder_weight=0.6)
        distiller, batch = Distiller(*pair("t5"), config), batch_of("t5")
        whole, items = distiller(batch), distiller.count_positions(batch)
        parts = [
            distiller({k: v[row : row + 1] for k, v in batch.items()}, num_items_in_batch=items)
            for row in range(2)
        ]
        torch.testing.assert_close(sum(p.encoder for p in parts), whole.encoder)
        torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)

    def test_the_teachers_decoder_does_not_run_for_its_encoder(self):
        (student, teacher), batch = pair("bart"), batch_of("bart")
        config = FDDConfig.paper(
            num_layers=2, alpha=0.0, beta=0.0, output_kd_weight=0.0, ce_weight=1.0, encoder_weight=1
        )
        distiller, calls = Distiller(student, teacher, config), []
        teacher.model.decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
        states = distiller.teacher_states(batch)
        terms = distiller(batch, teacher_states=states)
        assert torch.equal(terms.loss, distiller(batch).loss)
        assert terms.named()["encoder"] > 0
        assert not calls
        with pytest.raises(ValueError, match="teacher_states lack the encoder"):
            distiller(batch, teacher_states=list(states))

    def test_both_projections_in_feature_space(self):
        config = FDDConfig.paper(
            num_layers=2, space="feature", trajectory="mse", encoder_weight=1.0, ce_weight=0.5
        )
        distiller = Distiller(*pair("t5"), config)
        distiller(batch_of("t5")).loss.backward()
        names = dict(distiller.projection.named_parameters())
        assert names.keys() == {"decoder.weight", "encoder.weight"}
        assert all(weight.grad.any() for weight in names.values())

    def test_bad_options(self):
        with pytest.raises(
            ValueError, match=r"encoder_weight=0.5 compares the encoders .*masked_lm"
        ):
            Distiller(*pair("bert"), FDDConfig.paper(num_layers=2, encoder_weight=0.5))
        with pytest.raises(ValueError, match="encoder_trajectory"):
            FDDConfig.paper(encoder_trajectory="kl")
        with pytest.raises(ValueError, match="encoder_weight=1 needs sampled layers"):
            FDDConfig.paper(encoder_weight=1.0, num_layers=0)
        with pytest.raises(ValueError, match="encoder_weight=1 adds to the loss of the decoder"):
            FDDConfig(encoder_weight=1.0, alpha=0, beta=0, output_kd_weight=0)

    def test_labels_that_make_decoder_tokens(self):
        with pytest.raises(ValueError, match=r"ignore_index=-1.*leave it at -100"):
            Distiller(*pair("t5"), FDDConfig.paper(num_layers=2, ignore_index=-1))
