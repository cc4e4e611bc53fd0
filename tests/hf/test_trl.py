"""FDDSFTTrainer: TRL's data preparation with our loss."""

import pytest
import torch

from tests.support.hf_models import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")
from datasets import Dataset, IterableDataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from fdd_kernels import Distiller, FDDConfig, fdd_loss_reference  # noqa: E402
from fdd_kernels.data import pad_windows  # noqa: E402
from fdd_kernels.hf.teachers import model_states  # noqa: E402
from fdd_kernels.integrations import FDDSFTTrainer, FDDTrainerMixin  # noqa: E402

PAIRS = [
    {"prompt": f"one two {'three ' * n}", "completion": "four word words " * (4 - n % 4)}
    for n in range(8)
]
TEXTS = [{"text": "the words and a " * (1 + n % 5)} for n in range(8)]


def sft(
    output,
    rows,
    *,
    peft_config=None,
    config=None,
    student=None,
    teacher=None,
    data_collator=None,
    **arguments,
):
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "depth": 3}
    defaults = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_length": 48,
        "seed": 3,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 3,
    }
    return FDDSFTTrainer(
        model=student or tiny_model("llama", seed=1, **sizes),
        args=trl.SFTConfig(output_dir=str(output), **(defaults | arguments)),
        data_collator=data_collator,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]),
        processing_class=tokenizer,
        peft_config=peft_config,
        teacher=teacher or tiny_model("gpt2", seed=2, **sizes),
        fdd_config=config or FDDConfig.paper(num_layers=2),
    )


def test_token_weights_need_a_collator_that_passes_them_on(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7, 8][:n], "labels": [5, 6, 7, 8][:n], "token_weights": [2.0] * n}
        for n in (4, 3, 4, 2)
    ]
    with pytest.raises(ValueError, match=r"token_weights, which TRL's.*pad_windows"):
        sft(tmp_path, rows)
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match=r"token_weights, which TRL's.*pad_windows"):
        sft(tmp_path, rows, **skip)
    trainer = sft(tmp_path, rows, data_collator=pad_windows, **skip)
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_loss(trainer.model, dict(batch))
    del batch["token_weights"]
    torch.testing.assert_close(found, 2 * trainer.compute_loss(trainer.model, dict(batch)))


def test_token_weights_of_a_stream_need_a_collator_too(tmp_path):
    """Streams may not know their columns, and an evaluation may have several sets."""
    rows = [{"input_ids": [5, 6, 7], "token_weights": [2.0] * 3}] * 4
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None
    plain = Dataset.from_list(TEXTS)
    for sets in (
        {"train_dataset": stream},
        {"train_dataset": plain, "eval_dataset": {"a": plain, "b": stream}},
    ):
        with pytest.raises(ValueError, match=r"token_weights, which TRL's.*pad_windows"):
            FDDSFTTrainer(
                model=tiny_model("llama", seed=1, depth=3),
                args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1),
                teacher=tiny_model("gpt2", seed=2, depth=3),
                **sets,
            )


@pytest.mark.parametrize(
    ("rows", "arguments"),
    [
        (PAIRS, {"completion_only_loss": True}),
        (PAIRS, {"completion_only_loss": False}),
        (TEXTS, {}),
    ],
    ids=["completion only", "whole", "text"],
)
def test_the_loss_of_a_batch_is_that_of_the_specification(tmp_path, rows, arguments):
    trainer = sft(tmp_path, rows, **arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"].clone()
    distiller = trainer.distiller
    found = trainer.compute_loss(trainer.model, dict(batch))
    with torch.no_grad():
        teacher = distiller.teacher_states(batch)
        student = model_states(
            distiller.student, batch, distiller.student_layers, apply_final_norm=True
        )
        expected = fdd_loss_reference(
            student,
            distiller.student.weight,
            teacher,
            distiller.teacher.head()[0],
            labels,
            shift=True,
        )
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=0)
    if arguments.get("completion_only_loss"):
        assert (labels == -100).sum() > (batch["attention_mask"] == 0).sum()


def test_trains_logs_evaluates_and_saves(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = sft(tmp_path, PAIRS, max_steps=6)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    for name in ("output_kd", "trajectory", "derivative"):
        assert after[f"eval_{name}"] > 0
        assert any(name in row for row in trainer.state.log_history)
    trainer.save_model(str(tmp_path / "student"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for a, b in zip(loaded.parameters(), trainer.model.parameters()):
        assert torch.equal(a, b)


def test_options_that_change_are_logged_and_resumed(tmp_path):
    config = FDDConfig.paper(
        num_layers=2,
        schedules="teacher_mix=taid:60,0.4,1,0.2",
        gradient_balance="output_kd=1,trajectory=0.5;every=2",
    )
    saving = {"config": config, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    runs = [sft(tmp_path, PAIRS, **saving) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    mixes = [log["teacher_mix"] for log in runs[0].state.log_history if "teacher_mix" in log]
    assert mixes[:2] == [0.4, 0.4]
    assert mixes[-1] > 0.4 + 0.6 * 3 / 60 + 0.01
    assert runs[1].distiller.state_dict() == runs[0].distiller.state_dict()
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_trains_on_packed_sequences(tmp_path):
    trainer = sft(
        tmp_path, TEXTS, packing=True, packing_strategy="wrapped", max_length=24, max_steps=2
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[-1] == 24
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


def test_lora_students_train_their_adapters_alone(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = sft(tmp_path, PAIRS, peft_config=lora, max_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved == ("lora_B" in name or "lora_A" in name), name


def test_the_model_that_peft_config_adapts_is_its_own_teacher(tmp_path):
    """TRL adds the adapters to the model that was passed as the teacher."""
    model = tiny_model("llama", seed=1, depth=3, vocab_size=len(tiny_tokenizer()))
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = sft(
        tmp_path,
        PAIRS,
        student=model,
        teacher=model,
        peft_config=lora,
        max_steps=4,
        config=FDDConfig.paper(num_layers=2, ce_weight=1.0),
    )
    assert trainer.evaluate()["eval_output_kd"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    apart = tiny_model("llama", seed=1, depth=3, vocab_size=len(tiny_tokenizer()))
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        expected = Distiller(trainer.model.eval(), apart, trainer.fdd_config)(batch)
    found = trainer.evaluate()
    assert found["eval_output_kd"] > 1e-5
    assert found["eval_output_kd"] == pytest.approx(float(expected.output_kd), rel=1e-3)


def test_the_routers_of_a_student_with_experts(tmp_path):
    """TRL asks such models for their router loss, with their own coefficient unless SFTConfig names
    one.
    """
    student = tiny_model("mixtral", seed=1, depth=3, vocab_size=len(tiny_tokenizer()))
    own = student.config.router_aux_loss_coef
    for coefficient in (None, 0.25, 0.0):
        trainer = sft(
            tmp_path, PAIRS, student=student, max_steps=1, router_aux_loss_coef=coefficient
        )
        trainer.train()
        log = trainer.state.log_history[0]
        weighted = log["output_kd"] + log["trajectory"] + log["derivative"]
        assert ("router" in log) == (coefficient != 0)
        weight = own if coefficient is None else coefficient
        assert log["loss"] == pytest.approx(weighted + weight * log.get("router", 0.0), rel=1e-5)


def test_on_policy_batches_of_trls_own_trainer(tmp_path):
    """GKDTrainer trains on generated text: divide the loss by its positions."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    tokenizer, used = tiny_tokenizer(), []
    sizes = {"vocab_size": len(tokenizer), "depth": 3}

    class Trainer(FDDTrainerMixin, gkd.GKDTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            used.append(
                {name: tensor.clone() for name, tensor in inputs.items() if torch.is_tensor(tensor)}
            )
            return super().compute_loss(model, inputs, *args, **kwargs)

    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "four"}]
        for text in ("one two", "three")
    ]
    teacher = tiny_model("gpt2", seed=2, **sizes)
    trainer = Trainer(
        model=tiny_model("llama", seed=1, **sizes),
        teacher_model=teacher,
        teacher=teacher,
        fdd_config=FDDConfig.paper(num_layers=2),
        args=gkd.GKDConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            per_device_train_batch_size=2,
            max_steps=1,
            lmbda=1.0,
            max_new_tokens=9,
            max_length=24,
            bf16=False,
            gradient_checkpointing=False,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.1,
            lr_scheduler_type="constant",
        ),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]),
        processing_class=tokenizer,
    )
    trainer.train()
    (batch,) = used
    student = tiny_model("llama", seed=1, **sizes).train()
    distiller = Distiller(student, teacher, FDDConfig.paper(num_layers=2))
    loss = distiller({name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    loss.backward()
    moved = student.lm_head.weight - 0.1 * student.lm_head.weight.grad
    torch.testing.assert_close(trainer.model.lm_head.weight, moved, rtol=1e-4, atol=2e-6)


IGNORED = [({"loss_type": "dft"}, "loss_type"), ({"label_smoothing_factor": 0.1}, "label")]


@pytest.mark.parametrize(("arguments", "message"), IGNORED)
def test_options_that_would_be_ignored_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, TEXTS, **arguments)
