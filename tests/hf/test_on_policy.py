"""FDDDistillationTrainer and FDDGKDTrainer: the loss of the text that was generated."""

import sys
import types

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForMaskedLM

pytest.importorskip("trl", minversion="1.10")
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig
from trl.experimental.server_distillation import ServerDistillationConfig

from fdd_kernels import FDDConfig
from fdd_kernels.hf.teachers import Teacher
from fdd_kernels.integrations import FDDDistillationTrainer, FDDGKDTrainer
from fdd_kernels.integrations.trl_on_policy import pad_right
from tests.support.hf_models import tiny_config
from tests.support.on_policy import (
    CHATS,
    PROMPTS,
    Gradients,
    answering,
    mean_terms,
    require_plain_loop,
    sampling,
    student_model,
    teacher_model,
)

TERMS = ("loss", "output_kd", "trajectory", "derivative", "ce")
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


def test_the_loss_is_that_of_a_plain_loop_on_what_was_generated(tmp_path):
    """Two micro-batches of unlike lengths, and the teacher once."""
    seen = Gradients()
    trainer = sampling(tmp_path, callbacks=[seen])
    trainer.train()
    assert trainer.teacher_model is None
    assert len(trainer.texts) == 4
    for dense in (False, True):
        require_plain_loop(trainer.texts, trainer.state.log_history[0], seen.found[0], dense=dense)


@pytest.mark.parametrize(("lmbda", "generated"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_answers_of_the_data_and_of_the_student(tmp_path, lmbda, generated):
    seen = Gradients()
    trainer = answering(tmp_path, lmbda=lmbda, callbacks=[seen])
    trainer.train()
    assert trainer.teacher_model is trainer.teacher
    assert trainer.generated == generated
    require_plain_loop(trainer.texts, trainer.state.log_history[0], seen.found[0], dense=True)


def test_answers_of_the_teacher(tmp_path):
    seen = Gradients()
    trainer = answering(tmp_path, lmbda=0.0, seq_kd=True, callbacks=[seen])
    trainer.train()
    assert trainer.generated == 2
    require_plain_loop(trainer.texts, trainer.state.log_history[0], seen.found[0])


@pytest.mark.parametrize(
    ("make", "stops"), [(sampling, (2, 3)), pytest.param(answering, (3,), marks=pytest.mark.slow)]
)
def test_it_evaluates_logs_saves_and_resumes(tmp_path, make, stops):
    """Also in the second epoch, and in the midst of one."""
    rows = Dataset.from_list((PROMPTS if make is sampling else CHATS)[:3])
    runs = []
    for saved in (None, *stops):
        student = student_model()
        if saved:
            torch.nn.init.zeros_(student.lm_head.weight)
        runs.append(make(tmp_path, student=student, eval_dataset=rows, **SAVING))
        runs[-1].train(resume_from_checkpoint=saved and str(tmp_path / f"checkpoint-{saved}"))
    for one, *others in zip(*(run.model.parameters() for run in runs), strict=True):
        assert all(torch.equal(one, other) for other in others)
    logs, *again = (
        [{name: log[name] for name in TERMS} for log in run.state.log_history if "ce" in log]
        for run in runs
    )
    assert len(logs) == 4
    assert again == [logs] * len(stops)
    metrics = runs[0].evaluate()
    assert len(runs[0].evaluated) == 3
    with torch.no_grad():
        terms = mean_terms(runs[0].evaluated, runs[0].model, runs[0].teacher)
    for name, expected in terms.items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(expected), rel=1e-6)


def test_generation_without_a_token(tmp_path, monkeypatch):
    """Of a whole step: a warning, and the student stays. Of one prompt: the others count."""
    generate, calls = DistillationTrainer._generate_single_turn, []

    def sometimes(self, prompt_ids, *arguments):
        made = generate(self, prompt_ids, *arguments)
        made = [[]] * 4 if not calls else [[], *made[1:]]
        calls.append(list(zip(prompt_ids, made)))
        return made

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", sometimes)
    trainer = sampling(tmp_path, max_steps=2, callbacks=[seen := Gradients()])
    with pytest.warns(UserWarning, match=r"no position is valid in step 1.*no answer has a token"):
        trainer.train()
    first, second = trainer.state.log_history[:2]
    assert all(first[name] == 0 for name in TERMS)
    assert not any(gradient.any() for gradient in seen.found[0].values())
    assert len(calls) == 2
    # Adam has not moved: the second step is from the same student.
    require_plain_loop([text for text in calls[1] if text[1]], second, seen.found[1])


def test_what_a_tool_returned_is_no_answer(tmp_path, monkeypatch):
    trainer = sampling(tmp_path)
    made = {
        "prompt_ids": torch.tensor([[0, 70, 71], [72, 73, 74]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[80, 81, 82, 83], [84, 85, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]),
        "num_items_in_batch": torch.tensor(4),
    }
    monkeypatch.setattr(DistillationTrainer, "_prepare_inputs", lambda self, inputs: made)
    batch = trainer._prepare_inputs([])
    assert batch["input_ids"].tolist() == [[70, 71, 80, 81, 82, 83], [72, 73, 74, 84, 85, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, 80, -100, -100, 83],
        [-100, -100, -100, 84, 85, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert trainer.distiller.count_positions(batch) == 4
    made["pixel_values"] = torch.zeros(1)
    with pytest.raises(ValueError, match="gave an image"):
        trainer._prepare_inputs([])


def test_the_model_that_peft_config_adapts_is_its_own_teacher(tmp_path):
    model = student_model(torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = sampling(tmp_path, student=model, teacher=model, peft_config=lora, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["output_kd"] == pytest.approx(0, abs=1e-6)
    for name, parameter in trainer.model.named_parameters():
        assert ("lora_" in name) >= (not torch.equal(before[name], parameter)), name
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


class Texts(Teacher):
    """A cache of some texts."""

    name, depth, vocabulary = "texts", 3, 300

    def targets(self, batch, layers, *, apply_final_norm, final=True): ...


SERVER = {"teacher_model_server_url": "http://localhost:8000"}
SHARED = [
    ({"beta": 0.25}, ValueError, r'beta=0.25 would be ignored.*output_divergence="jsd:0.25"'),
    ({"teacher_model_init_kwargs": {"dtype": "auto"}}, ValueError, "teacher_model_init_kwargs"),
    ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor=0"),
    ({"config": FDDConfig.paper(ignore_index=-1)}, ValueError, "ignore_index=-1, but TRL labels"),
    ({"teacher": Texts()}, TypeError, "teacher is a Texts, which holds fixed texts"),
    ({"teacher": "a/name"}, TypeError, "teacher must be a model, got the string 'a/name'"),
    ({"teacher_model": "a/name"}, TypeError, "takes the teacher once: give teacher="),
]
OF_ONE = {
    sampling: [
        ({"teacher_model_revision": "v2"}, ValueError, "teacher_model_revision='v2' would be"),
        ({"rows": [{"text": "one"}]}, ValueError, "the data has text, but no prompt"),
        ({"rows": [{"prompt": "a", "image": 1}]}, ValueError, "has image, but .*texts alone"),
        ({"rows": [{"prompt": "a", "token_weights": [1.0]}]}, ValueError, "has token_weights"),
        ({"eval_dataset": Dataset.from_list([{"text": "one"}])}, ValueError, "no prompt"),
        (
            {"config_class": ServerDistillationConfig, **SERVER},
            ValueError,
            "teacher_model_server_url='http://localhost:8000': a server gives log-probabilities",
        ),
    ],
    answering: [
        ({"rows": [{"text": "one"}]}, ValueError, "the data has text, but no messages"),
        ({"loss_type": "dft"}, ValueError, "loss_type='dft' would be ignored.*Leave .*='nll'"),
        ({"packing": True}, ValueError, "packing=True would be ignored"),
        ({"assistant_only_loss": True}, ValueError, "assistant_only_loss=True would be"),
        ({"completion_only_loss": False}, ValueError, "completion_only_loss=False would be"),
    ],
}


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [(make, *case) for make, own in OF_ONE.items() for case in SHARED + own],
)
def test_what_would_be_ignored_is_refused(tmp_path, make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FDDDistillationTrainer, GKDConfig, "args must be a DistillationConfig, got GKDConfig"),
        (FDDGKDTrainer, DistillationConfig, "args must be a GKDConfig, got DistillationConfig"),
    ],
)
def test_options_of_another_trainer(tmp_path, kind, arguments, message):
    with pytest.raises(TypeError, match=message):
        kind(student_model(), teacher_model(), arguments(str(tmp_path), use_cpu=True, bf16=False))


def test_other_tasks_are_refused(tmp_path):
    bert = AutoModelForMaskedLM.from_config(tiny_config("bert", is_decoder=False))
    for make in (sampling, answering):
        with pytest.raises(
            TypeError, match="is for causal LMs, but the models are of the task masked_lm"
        ):
            make(tmp_path, student=bert)


def test_gkd_scales_gradients_which_deepspeed_holds(tmp_path):
    arguments = GKDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    arguments.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="DeepSpeed holds it: use DistributedDataParallel"):
        FDDGKDTrainer(student_model(), teacher_model(), arguments)


@pytest.mark.parametrize("make", [sampling, answering])
def test_bfloat16_which_is_trls_default(tmp_path, make):
    """accelerate wraps the forward of GKDTrainer's teacher, whose reading is checked."""
    models = {"student": student_model(torch.float32), "teacher": teacher_model(torch.float32)}
    trainer = make(tmp_path, bf16=True, **models)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert 0 < trainer.state.log_history[0]["loss"] < 10


def test_fewer_prompts_than_a_step_takes(tmp_path):
    trainer = sampling(tmp_path, PROMPTS[:3])
    with pytest.raises(ValueError, match="the data has 3 prompts, but a step takes 4"):
        trainer.train()


def test_an_empty_prompt_is_named(tmp_path):
    trainer = sampling(tmp_path, [{"prompt": ""}] * 4)
    with pytest.raises(ValueError, match="a prompt has no token: remove empty prompts"):
        trainer.train()


def test_padding_moves_behind_the_tokens():
    batch = {
        "input_ids": torch.tensor([[9, 9, 1, 2, 9], [9, 3, 4, 9, 5]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 1]]),
    }
    moved = pad_right(batch)
    assert moved["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert moved["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_an_older_trl_is_named_and_leaves_the_sft_trainer_alone(monkeypatch):
    import fdd_kernels.integrations as integrations

    older = types.ModuleType("trl")
    older.__version__, older.SFTTrainer = "0.20.0", sys.modules["trl"].SFTTrainer
    monkeypatch.setitem(sys.modules, "trl", older)
    for module in ("trl_on_policy", "trl_sft"):
        monkeypatch.delitem(sys.modules, f"fdd_kernels.integrations.{module}")
    for name in ("FDDDistillationTrainer", "FDDGKDTrainer"):
        with pytest.raises(ImportError, match=r"trl 0\.20\.0 lacks one of them.*1\.10 or later"):
            getattr(integrations, name)
    assert issubclass(integrations.FDDSFTTrainer, older.SFTTrainer)
