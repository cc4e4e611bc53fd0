"""The auxiliary loss of a student with experts is the model's own, in every way to train."""

import pytest
import torch
from transformers import TrainingArguments

from fdd_kernels import Distiller, FDDConfig, FDDLossTerms
from fdd_kernels.integrations import FDDTrainer
from tests.support.hf_models import tiny_batch, tiny_model
from tests.support.training import examples, lightning_options, pad

CONFIG = FDDConfig.paper(num_layers=2, ce_weight=0.5)
COEFFICIENT = 0.3


def mixture(*, on=True, family="mixtral"):
    return tiny_model(
        family, depth=3, seed=1, output_router_logits=on, router_aux_loss_coef=COEFFICIENT
    )


def teacher():
    return tiny_model("gpt2", depth=3, seed=2)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "options", [{}, {"output_kd_weight": 0.0, "ce_weight": 0.0}, {"alpha": 0.0, "beta": 0.0}]
)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_it_is_added_with_its_coefficient(family, options):
    student, batch = mixture(family=family), tiny_batch()
    config = FDDConfig.paper(**({"num_layers": 2, "ce_weight": 0.5} | options))
    terms = Distiller(student, teacher(), config)(batch)
    assert isinstance(terms, FDDLossTerms)
    assert len(terms) == 5
    assert list(terms.named()) == [*FDDLossTerms._fields, "router"]
    terms.loss.backward()
    found = gradients(student)
    student.config.output_router_logits = False  # as it is at each step
    plain = Distiller(student, teacher(), config)(batch)
    assert plain.router is None
    own = student(
        batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
    ).aux_loss
    (plain.loss + COEFFICIENT * own).backward()
    torch.testing.assert_close(terms.router, own.detach())
    torch.testing.assert_close(terms.loss, plain.loss + COEFFICIENT * own)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    assert any("gate.weight" in name and gradient.any() for name, gradient in found.items())


def test_its_share_of_a_step_is_that_of_its_positions():
    distiller, batch = Distiller(mixture(), teacher(), CONFIG), tiny_batch()
    whole, half = (
        distiller(batch),
        distiller(batch, num_items_in_batch=2 * distiller.count_positions(batch)),
    )
    torch.testing.assert_close(2 * half.router, whole.router)
    torch.testing.assert_close(2 * half.loss, whole.loss)
    nothing = distiller(batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert float(nothing.router) == 0
    assert float(nothing.loss.detach()) == 0


def test_the_models_logits_are_not_computed_for_it():
    student, sizes = mixture(), []
    distiller = Distiller(student, teacher(), CONFIG)
    student.lm_head.register_forward_hook(lambda _m, _a, output: sizes.append(output.shape[-1]))
    distiller(tiny_batch())
    assert sizes == [1]


def test_a_coefficient_that_is_missing_is_named():
    student = tiny_model("llama", depth=3, seed=1)
    student.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"config\.router_aux_loss_coef"):
        Distiller(student, teacher(), CONFIG)(tiny_batch())


def test_routers_that_show_no_logits_are_named():
    student = tiny_model("llama", depth=3, seed=1)
    student.config.output_router_logits, student.config.router_aux_loss_coef = True, 0.1
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM .*no router_logits: set output_router_logits=False"
    ):
        Distiller(student, teacher(), CONFIG)(tiny_batch())


def test_every_trainer_adds_and_logs_it(tmp_path):
    rows = examples([9, 5, 12, 7])
    run = FDDTrainer(
        model=mixture(),
        teacher=teacher(),
        fdd_config=CONFIG,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=pad,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            learning_rate=1e-3,
        ),
    )
    batches = [pad(rows[:2]), pad(rows[2:])]
    distiller, found = Distiller(mixture(), teacher(), CONFIG), run.evaluate()
    with torch.no_grad():
        assert found["eval_router"] == pytest.approx(float(distiller(pad(rows)).router), rel=1e-5)
    run.train()
    log = run.state.log_history[0]
    weighted = (
        log["output_kd"]
        + log["trajectory"]
        + log["derivative"]
        + 0.5 * log["ce"]
        + COEFFICIENT * log["router"]
    )
    assert log["loss"] == pytest.approx(weighted, rel=1e-5)
    # By Lightning: each micro-batch is weighted by its tokens, as the other terms are.
    pl = pytest.importorskip("lightning.pytorch")
    from fdd_kernels.integrations import FDDLightningModule

    module = FDDLightningModule(
        mixture(), teacher(), CONFIG, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    trainer = pl.Trainer(
        max_epochs=1,
        **lightning_options(tmp_path),
        accumulate_grad_batches=2,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    student = mixture().train()
    distiller = Distiller(student, teacher(), CONFIG)
    items = sum(distiller.count_positions(batch) for batch in batches)
    terms = [distiller(batch, num_items_in_batch=items) for batch in batches]
    assert float(trainer.callback_metrics["train_router"]) == pytest.approx(
        float(distiller(batches[1]).router), rel=1e-5
    )
    sum(part.loss for part in terms).backward()
    for (name, parameter), (_, start) in zip(
        module.student.named_parameters(), student.named_parameters(), strict=True
    ):
        moved = start - (0 if start.grad is None else 0.1 * start.grad)
        torch.testing.assert_close(
            parameter, moved, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
