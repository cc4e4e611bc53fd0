"""FDDTrainer: logging, accumulation, evaluation, saving, resuming, data parallelism."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
)

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.data import pad_windows
from fdd_kernels.integrations import FDDTrainer
from tests.support.hf_models import VOCAB, pad_left, tiny_model
from tests.support.training import CONFIG, TERMS, examples, pad, same_parameters, trainer


@pytest.mark.parametrize("labels", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_accumulation_over_unequal_micro_batches_equals_one_big_batch(tmp_path, labels):
    rows = examples([4, 17, 6, 12, 5, 16, 9, 11], labels=labels)
    config = CONFIG if labels else FDDConfig.paper(num_layers=2)
    runs = []
    for size, steps in ((8, 1), (1, 8), (2, 4)):
        # Plain gradient descent: the parameters show the gradient, not only its direction.
        run = trainer(
            tmp_path,
            train=rows,
            config=config,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
            lr_scheduler_type="constant",
        )
        run.train()
        runs.append(run)
    start = tiny_model("llama", depth=3, seed=1)
    assert (runs[0].model.lm_head.weight - start.lm_head.weight).abs().max() > 1e-3
    big, *accumulated = runs
    for run in accumulated:
        same_parameters(run.model, big.model, rtol=1e-4, atol=2e-6)
        for name in ("loss", *(TERMS if labels else TERMS[:3])):
            assert run.state.log_history[0][name] == pytest.approx(
                big.state.log_history[0][name], rel=1e-4
            ), name
    # And both are the Distiller's mean over all tokens.
    terms = Distiller(start, big.teacher, config)(pad(rows))
    for name in ("loss", *TERMS):
        assert big.state.log_history[0][name] == pytest.approx(
            float(getattr(terms, name).detach()), rel=1e-4
        )


def test_token_weights_of_the_data(tmp_path):
    """They reach the loss, and the step's denominator is the number of valid tokens."""
    rows = [
        row | {"token_weights": [0.5 + (t % 3) for t in range(len(row["input_ids"]))]}
        for row in examples([4, 17, 6, 12])
    ]
    runs = []
    for size, steps in ((4, 1), (1, 4)):
        run = trainer(
            tmp_path,
            train=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
            lr_scheduler_type="constant",
        )
        run.data_collator = pad_windows
        run.train()
        runs.append(run)
    same_parameters(runs[1].model, runs[0].model, rtol=1e-4, atol=2e-6)
    batch = pad_windows(rows)
    assert batch["token_weights"].dtype == torch.float32
    distiller = Distiller(tiny_model("llama", depth=3, seed=1), runs[0].teacher, CONFIG)
    terms = distiller(batch)
    for run in runs:
        for name in ("loss", *TERMS):
            assert run.state.log_history[0][name] == pytest.approx(
                float(getattr(terms, name).detach()), rel=1e-4
            )
    del batch["token_weights"]
    assert abs(terms.loss - distiller(batch).loss) > 0.1


@pytest.mark.parametrize("labels", [True, False])
def test_padding_on_the_left_changes_nothing(tmp_path, labels):
    """Neither the loss nor its denominator."""
    rows, runs = examples([4, 17, 6, 12, 5, 16, 9, 11], labels=labels), []
    for collator in (pad, lambda rows: pad_left(pad(rows))):
        run = trainer(
            tmp_path,
            train=rows,
            held_out=rows[:5],
            config=CONFIG if labels else FDDConfig.paper(num_layers=2),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.1,
        )
        run.data_collator = collator
        run.train()
        run.evaluate()
        runs.append(run)
    right, left = runs
    for found, expected in zip(left.state.log_history, right.state.log_history, strict=True):
        for name in ("loss", *TERMS):
            for key in {name, f"eval_{name}"} & expected.keys():
                assert found[key] == pytest.approx(expected[key], rel=1e-5), key
    same_parameters(left.model, right.model, rtol=1e-4, atol=2e-6)


def test_every_term_is_logged_as_mean_since_the_last_log(tmp_path):
    rows = examples([9] * 16)
    every = trainer(tmp_path, train=rows, max_steps=4)
    every.train()
    seldom = trainer(tmp_path, train=rows, max_steps=4, logging_steps=2)
    seldom.train()
    each = [log for log in every.state.log_history if "loss" in log]
    pairs = [log for log in seldom.state.log_history if "loss" in log]
    assert [log["step"] for log in pairs] == [2, 4]
    for index, log in enumerate(pairs):
        for name in ("loss", *TERMS):
            mean = (each[2 * index][name] + each[2 * index + 1][name]) / 2
            assert log[name] == pytest.approx(mean, rel=1e-4), name
        weighted = log["output_kd"] + log["trajectory"] + log["derivative"] + 0.5 * log["ce"]
        assert log["loss"] == pytest.approx(weighted, rel=1e-4)


def test_evaluation_is_a_mean_over_tokens_not_over_batches(tmp_path):
    rows = examples([3, 18, 4, 17, 5])
    run = trainer(tmp_path, held_out=rows, per_device_eval_batch_size=2)
    metrics = run.evaluate()
    with torch.no_grad():
        whole = run.distiller(pad(rows))
    for name in ("loss", *TERMS):
        assert metrics[f"eval_{name}"] == pytest.approx(float(getattr(whole, name)), rel=1e-5), name
    assert run.state.log_history[-1]["eval_trajectory"] == metrics["eval_trajectory"]


def test_evaluation_during_training_keeps_the_training_means(tmp_path):
    rows = examples([9] * 16)
    plain = trainer(tmp_path, train=rows, max_steps=4, logging_steps=4)
    plain.train()
    evaluated = trainer(
        tmp_path,
        train=rows,
        held_out=rows[:5],
        max_steps=4,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=1,
    )
    evaluated.train()
    find = lambda run: next(log for log in run.state.log_history if "loss" in log)  # noqa: E731
    for name in ("loss", *TERMS):
        assert find(evaluated)[name] == pytest.approx(find(plain)[name], rel=1e-6), name
    assert sum("eval_loss" in log for log in evaluated.state.log_history) == 4


def test_several_evaluation_sets(tmp_path):
    rows = examples([9] * 4)
    metrics = trainer(tmp_path, held_out={"a": rows[:2], "b": rows[2:]}).evaluate()
    assert {
        "eval_a_loss",
        "eval_a_derivative",
        "eval_b_loss",
        "eval_b_derivative",
    } <= metrics.keys()
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]


def test_a_step_without_a_single_label_changes_nothing(tmp_path):
    rows = examples([6, 6])
    for row in rows:
        row["labels"] = [-100] * 6
    run = trainer(tmp_path, train=rows, max_steps=1)
    run.train()
    assert all(run.state.log_history[0][name] == 0 for name in ("loss", *TERMS))
    same_parameters(run.model, tiny_model("llama", depth=3, seed=1), rtol=0, atol=0)


def test_resumed_equals_uninterrupted(tmp_path):
    rows = examples([9, 5, 12, 7] * 5)
    options = {
        "train": rows,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    first = trainer(tmp_path / "parts", **options)
    first.train()
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-8",
    ]
    resumed = trainer(tmp_path / "parts", student=tiny_model("llama", depth=3, seed=77), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    same_parameters(resumed.model, whole.model, rtol=0, atol=0)
    for one, other in zip(
        whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True
    ):
        assert one == other


def test_only_the_student_is_saved(tmp_path):
    run = trainer(
        tmp_path, train=examples([9] * 8), max_steps=1, save_strategy="steps", save_steps=1
    )
    run.train()
    run.save_model(str(tmp_path / "student"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert type(loaded) is type(run.model)
    same_parameters(loaded, run.model, rtol=0, atol=0)
    weights = sum(p.numel() for p in run.model.parameters()) * 4
    assert (tmp_path / "student" / "model.safetensors").stat().st_size < weights + 20_000
    assert (
        load_file(tmp_path / "checkpoint-1" / "model.safetensors").keys()
        <= run.model.state_dict().keys()
    )
    optimizer = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(list(run.model.parameters()))
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert {"output_kd", "trajectory", "derivative", "ce"} <= state["log_history"][0].keys()


def test_the_teacher_does_not_change(tmp_path):
    run = trainer(tmp_path, train=examples([9] * 8), max_steps=2)
    run.train()
    same_parameters(run.teacher, tiny_model("gpt2", depth=3, seed=2), rtol=0, atol=0)
    assert not any(module.training for module in run.teacher.modules())
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in run.teacher.parameters()}


def test_training_lowers_held_out_kl_to_the_teacher(tmp_path):
    rows, held_out = examples([12] * 64), examples([12] * 16, seed=5)
    run = trainer(
        tmp_path,
        train=rows,
        held_out=held_out,
        max_steps=40,
        learning_rate=5e-3,
        logging_steps=40,
        config=FDDConfig.paper(num_layers=2),
    )
    before = run.evaluate()["eval_output_kd"]
    run.train()
    assert run.evaluate()["eval_output_kd"] < 0.6 * before


def test_bf16_computes_in_bfloat16(tmp_path):
    """Accelerate puts autocast around the model's forward, which never runs here."""
    seen = []
    run = trainer(tmp_path, train=examples([9] * 4), max_steps=1, bf16=True)
    run.model.model.layers[0].mlp.register_forward_hook(
        lambda _m, _a, output: seen.append(output.dtype)
    )
    run.teacher.transformer.h[0].mlp.register_forward_hook(
        lambda _m, _a, output: seen.append(output.dtype)
    )
    run.train()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_gradient_checkpointing(tmp_path):
    rows = examples([9] * 8)
    plain, checkpointed = (
        trainer(tmp_path, train=rows, max_steps=2, gradient_checkpointing=on)
        for on in (False, True)
    )
    plain.train()
    checkpointed.train()
    assert checkpointed.model.model.layers[0].gradient_checkpointing
    same_parameters(checkpointed.model, plain.model, rtol=1e-5, atol=1e-7)


def test_model_init_students_are_the_ones_distilled(tmp_path):
    run = trainer(tmp_path, train=examples([9] * 4), max_steps=1)
    fresh = FDDTrainer(
        model_init=lambda: tiny_model("llama", depth=3, seed=8),
        args=run.args,
        teacher=run.teacher,
        fdd_config=CONFIG,
        train_dataset=run.train_dataset,
        data_collator=pad,
    )
    fresh.train()
    moved = (
        (fresh.model.lm_head.weight - tiny_model("llama", depth=3, seed=8).lm_head.weight)
        .abs()
        .max()
    )
    assert moved > 1e-4


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}])
def test_options_that_would_be_ignored_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="label_smoothing_factor=0"):
        trainer(tmp_path, **options)


def test_data_parallel_gradients_are_exchanged(tmp_path):
    """Under DistributedDataParallel the loss runs inside the wrapper's forward, or gradients would
    not be averaged.
    """
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        run = trainer(tmp_path, train=examples([9] * 4))
        batch = pad(examples([9] * 4))
        run.compute_loss(run.model.train(), batch).backward()
        expected = {name: p.grad.clone() for name, p in run.model.named_parameters()}
        run.model.zero_grad()
        wrapped = torch.nn.parallel.DistributedDataParallel(run.model)
        exchanged = []

        def hook(_state, bucket):
            exchanged.append(sum(p.numel() for p in bucket.parameters()))
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, hook)
        run.compute_loss(wrapped.train(), batch).backward()
        assert sum(exchanged) == sum(p.numel() for p in run.model.parameters())
        for name, p in run.model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name])
        assert "forward" not in vars(run.model)
    finally:
        torch.distributed.destroy_process_group()


def test_works_with_transformers_own_collator(tmp_path):
    """A tokenizer's collator pads labels with -100 and leaves extra columns out."""
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({"<pad>": 0, **{str(i): i for i in range(1, VOCAB)}})
        ),
        pad_token="<pad>",
    )
    run = trainer(
        tmp_path, train=[row | {"note": 1} for row in examples([5, 9, 7, 8])], max_steps=1
    )
    run.data_collator = DataCollatorForSeq2Seq(tokenizer)
    run.train()
    expected = run.distiller.count_positions(pad(examples([5, 9, 7, 8])))
    loader = iter(run.get_train_dataloader())
    assert run.get_batch_samples(loader, 1, run.args.device)[1] == expected
