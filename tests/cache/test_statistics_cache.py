"""A cache of sufficient statistics in training: equal to the live teacher for one head, and for no
other.
"""

from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.cli.cache_teacher import cache_teacher
from fdd_kernels.cli.distill.run import distill
from fdd_kernels.common.errors import UserError
from fdd_kernels.data import pad_windows
from fdd_kernels.hf import loss
from fdd_kernels.hf.heads import head_digest
from fdd_kernels.hf.teachers import TeacherWithHead
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.teacher_cache import (
    StatisticsCache,
    SummaryCache,
    TeacherCache,
    open_teacher_cache,
    write_statistics_cache,
    write_summary_cache,
)
from tests.support.cache_inputs import (
    LAYERS,
    batch_of,
    same_loss_and_gradients,
    student_model,
    teacher_model,
    weighted,
)
from tests.support.commands import FROM_CACHE, cache_options, options, quiet
from tests.support.hf_models import pad_left, tiny_tokenizer

CONFIG = FDDConfig.paper(
    student_layers=(1, 2, 3), teacher_layers=LAYERS, ce_weight=0.5, train_head=False
)


def write(folder, windows, teacher=None, student=None, options=None, **changes):
    defaults = {
        "layers": LAYERS,
        "batch_size": 4,
        "shard_size": 60_000,
        "tokenizer": tiny_tokenizer(),
    }
    return write_summary_cache(
        folder,
        teacher or teacher_model(),
        student or student_model(),
        windows,
        options=options,
        **(defaults | changes),
    )


@pytest.fixture(scope="module")
def cache(windows, tmp_path_factory):
    return write(tmp_path_factory.mktemp("statistics"), windows)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi_head_bias", "granite"])
def test_it_equals_the_live_teacher(windows, tmp_path, family):
    teacher, student = teacher_model(family), student_model()
    student.lm_head.requires_grad_(False)
    cache = write(tmp_path, windows, teacher, student)
    assert len(cache.files.index["shards"]) > 1
    trained = torch.nn.ModuleList([student.model])  # the head has no gradient
    for changes in (
        {},
        {"derivative": "mse", "beta": 3.0},
        {"alpha": 0.0, "derivative": "centered_cosine"},
        {"beta": 0.0},
        {"output_kd_weight": 0.0},
        {"alpha": 0.0, "beta": 0.0},
        {"layer_weights": (0.5, 0.0, 2.0)},
        {"trajectory": "jsd:0", "output_divergence": "jsd:0"},
    ):
        config = replace(CONFIG, **changes)
        same_loss_and_gradients(
            trained,
            Distiller(student, cache, config),
            Distiller(student, teacher, config),
            batch_of(cache),
        )


def test_shift_labels_in_the_place_of_labels(cache):
    student = student_model()
    student.lm_head.requires_grad_(False)
    distiller, batch = Distiller(student, cache, CONFIG), batch_of(cache)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    given = {name: tensor for name, tensor in batch.items() if name != "labels"} | {
        "shift_labels": shifted
    }
    for found, expected in zip(distiller(given), distiller(batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_padding_on_the_left(cache):
    """The label of the first token, at the last padding position, is not valid."""
    student, teacher = student_model(), teacher_model()
    student.lm_head.requires_grad_(False)
    cached, live = Distiller(student, cache, CONFIG), Distiller(student, teacher, CONFIG)
    right = batch_of(cache)
    left = pad_left(right)
    assert not torch.equal(left["input_ids"], right["input_ids"])
    terms = same_loss_and_gradients(torch.nn.ModuleList([student.model]), cached, live, left)
    torch.testing.assert_close(torch.stack(terms), torch.stack(cached(right)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("derivative_temperature", [None, 2.0, 1.5])
def test_temperatures_and_the_output_among_the_layers(windows, tmp_path, derivative_temperature):
    fixed = {"temperature": 2.0, "output_temperature": 3.0, "output_in_dynamics": True}
    fixed["derivative_temperature"] = derivative_temperature
    teacher, student = teacher_model(), student_model()
    student.lm_head.requires_grad_(False)
    cache, config = (
        write(tmp_path, windows, teacher, student, LossOptions(**fixed)),
        replace(CONFIG, **fixed),
    )
    trained = torch.nn.ModuleList([student.model])
    same_loss_and_gradients(
        trained,
        Distiller(student, cache, config),
        Distiller(student, teacher, config),
        batch_of(cache),
    )
    # An index of an earlier release has no derivative_temperature, and none is written that is the
    # temperature.
    is_own = derivative_temperature not in (None, fixed["temperature"])
    assert ("derivative_temperature" in cache.files.contents["options"]) == is_own
    for other in {None, 2.0, 1.5} - {derivative_temperature}:
        config = replace(config, derivative_temperature=other)
        if not is_own and other in (None, fixed["temperature"]):
            Distiller(student, cache, config)
        else:
            with pytest.raises(ValueError, match=f"derivative_temperature={other}.*was made with"):
                Distiller(student, cache, config)


def test_token_weights(cache):
    teacher, student, batch = teacher_model(), student_model(), weighted(batch_of(cache))
    student.lm_head.requires_grad_(False)
    cached, live = Distiller(student, cache, CONFIG), Distiller(student, teacher, CONFIG)
    same_loss_and_gradients(torch.nn.ModuleList([student.model]), cached, live, batch)


def test_fewer_labels_and_a_divisor(cache):
    teacher, student, batch = teacher_model(), student_model(), batch_of(cache)
    batch["labels"][0] = -100
    for name, mine, theirs in zip(
        ("loss", "output_kd", "trajectory", "derivative", "ce"),
        Distiller(student, cache, CONFIG)(batch, num_items_in_batch=7),
        Distiller(student, teacher, CONFIG)(batch, num_items_in_batch=7),
    ):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_weights_that_change_use_one_summary_loss(cache, monkeypatch):
    """The head's SHA-256 and its Gram matrix are computed once, not for each step's options."""
    digests = []
    monkeypatch.setattr(
        loss, "head_digest", lambda *head: (digests.append(head), head_digest(*head))[1]
    )
    student, batch = student_model(), batch_of(cache)
    config = replace(
        CONFIG,
        ce_weight=0.0,
        schedules="alpha=linear:0,2,0,3",
        stages="both=2:ce_weight=0,output_kd_weight=1;task:ce_weight=1,output_kd_weight=0",
        gradient_balance="trajectory=1,derivative=2;every=2",
    )
    distiller, summaries = Distiller(student, cache, config), []
    for step in range(4):
        terms = distiller(batch, step=step)
        plain = Distiller(student, cache, replace(CONFIG, **distiller.logged()))
        for found, expected in zip(terms, plain(batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        summaries.append(distiller._compare._summary_loss)
    assert len(set(map(id, summaries))) == 1
    assert len(digests) == 1 + 4  # and one of each plain distiller
    with pytest.raises(ValueError, match=r"teacher_mix=0.4 mixes the student's logits"):
        Distiller(student, cache, replace(CONFIG, schedules="teacher_mix=taid:9"))
    with pytest.raises(ValueError, match=r"temperature=1.1.*, but the summary in .* was made with"):
        Distiller(student, cache, replace(CONFIG, schedules="temperature=linear:1,2,0,9"))


def test_it_trains_without_teacher(cache, tmp_path):
    student = student_model().train()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=4,
    )
    student.lm_head.requires_grad_(False)
    trainer = FDDTrainer(
        model=student,
        teacher=open_teacher_cache(cache.path),
        fdd_config=CONFIG,
        args=arguments,
        train_dataset=cache.dataset("train"),
        data_collator=pad_windows,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert "lm_head.weight" not in changed
    assert len(changed) == len(before) - 1


class TestRefusals:
    def test_another_head(self, cache):
        other = student_model()
        with torch.no_grad():
            other.lm_head.weight[3, 4] += 1
        with pytest.raises(ValueError, match="the student's head is not the one"):
            Distiller(other, cache, CONFIG)(batch_of(cache))

    def test_a_head_that_changes_while_training(self, cache):
        student = student_model()
        distiller = Distiller(student, cache, CONFIG)
        distiller(batch_of(cache))
        with torch.no_grad():
            student.lm_head.weight.mul_(1.5)
        with pytest.raises(ValueError, match="the student's head is not the one"):
            distiller(batch_of(cache))

    def test_a_head_that_trains(self, cache):
        with pytest.raises(ValueError, match="student_weight requires grad"):
            Distiller(student_model(), cache, replace(CONFIG, train_head=True))(batch_of(cache))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"trajectory": "jsd"}, "trajectory='jsd'.*cache of its hidden states"),
            ({"output_divergence": "tv"}, "output_divergence='tv'.*cache of its hidden"),
            ({"derivative": "weighted_cosine"}, "derivative='weighted_cosine'.*cache of its"),
            ({"teacher_mix": 0.5}, "teacher_mix=0.5.*cache of its hidden states"),
            ({"temperature": 2.0}, "temperature=2.0, but the summary"),
            (
                {"derivative_temperature": 2.0},
                "derivative_temperature=2.0, but .*derivative_temperature=None",
            ),
            ({"output_temperature": 2.0}, "output_temperature=2.0"),
            ({"output_in_dynamics": True}, "output_in_dynamics=True"),
            ({"student_layers": (1, 2), "teacher_layers": LAYERS[:2]}, "is of \\[1, 2, 4\\]"),
            ({"apply_final_norm": False}, "apply_final_norm=False"),
            ({"layer_alignment": "emd"}, "layer_alignment='emd' .*a cache of its states"),
        ],
        ids=str,
    )
    def test_objectives(self, cache, changes, message):
        with pytest.raises(ValueError, match=message):
            Distiller(student_model(), cache, replace(CONFIG, **changes))

    def test_a_soft_capped_student(self, windows, tmp_path):
        student = teacher_model("gemma2")
        with pytest.raises(ValueError, match="student_softcap"):
            write(tmp_path, windows, student=student)
        assert not any(tmp_path.iterdir())

    def test_one_kind_for_the_other(self, cache):
        with pytest.raises(
            ValueError, match="is a cache of statistics, but one of states is needed"
        ):
            TeacherCache(cache.path)
        assert isinstance(open_teacher_cache(cache.path), SummaryCache)

    def test_hidden_states_for_a_summary(self, cache):
        student, batch = student_model(), batch_of(cache)
        hidden = Distiller(student, teacher_model(), CONFIG).teacher_states(batch)
        with pytest.raises(
            ValueError, match=r"teacher_states are hidden states.*take the teacher_states of this"
        ):
            Distiller(student, cache, CONFIG)(batch, teacher_states=hidden)


def test_the_names_of_earlier_releases(cache):
    assert StatisticsCache is SummaryCache
    assert write_statistics_cache is write_summary_cache
    assert issubclass(TeacherCache, TeacherWithHead)
    assert not isinstance(cache, TeacherWithHead)
    with pytest.warns(DeprecationWarning, match=r"reader is now \.files"):
        assert cache.reader is cache.files


def test_targets_for_several_students(cache):
    """Each distiller has the loss for its own student: one's head is not taken for another's."""
    batch, students = batch_of(cache), [student_model(), student_model(), student_model()]
    with torch.no_grad():
        students[1].model.layers[0].mlp.up_proj.weight.mul_(1.5)
        students[2].lm_head.weight.mul_(1.5)
    distillers = [Distiller(student, cache, CONFIG) for student in students]
    targets = distillers[0].teacher_states(batch)
    losses = [float(d(batch, teacher_states=targets).loss) for d in distillers[:2]]
    assert losses == [float(d(batch).loss) for d in distillers[:2]]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="head is not the one that the summary in"):
        distillers[2](batch, teacher_states=targets)


class TestCommand:
    def test_lora_from_statistics_equals_lora_from_the_teacher(self, inputs, tmp_path):
        student = str(inputs / "student")
        cache = cache_options(
            inputs, tmp_path / "cache", kind="statistics", student=student, dtype=None
        )
        cache_teacher(cache, quiet())
        lora = {"lora_rank": 4}
        live = distill(options(inputs, tmp_path / "live", **lora), quiet())
        mine = distill(
            options(
                inputs, tmp_path / "run", teacher_cache=tmp_path / "cache", **FROM_CACHE, **lora
            ),
            quiet(),
        )
        for name, value in mine["held_out"].items():
            assert live["held_out"][name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
        # the teacher's distribution at each position is not in its statistics
        missing = live["held_out"].keys() - mine["held_out"].keys()
        assert {name for name in missing if not name.startswith("kl_layer_")} == {"kl", "agreement"}
        with pytest.raises(
            UserError, match=r"holds a summary for one head that does not change: train adapters"
        ):
            distill(
                options(inputs, tmp_path / "all", teacher_cache=tmp_path / "cache", **FROM_CACHE),
                quiet(),
            )
        assert not list((tmp_path / "all").glob("checkpoint-*"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"kind": "statistics"}, "needs student"),
            (
                {"kind": "statistics", "student": "x", "dtype": "int8"},
                "is stored in float32",
            ),
            ({"kind": "logits"}, "kind='logits' is not one of states, statistics"),
            ({"temperature": 2.0}, "temperature=2.0 is for kind='statistics'"),
            (
                {"derivative_temperature": 2.0},
                "derivative_temperature=2.0 is for kind='statistics'",
            ),
        ],
        ids=str,
    )
    def test_options_that_do_not_fit(self, inputs, tmp_path, changes, message):
        with pytest.raises(UserError, match=message):
            cache_options(inputs, tmp_path, **({"dtype": None} | changes))
