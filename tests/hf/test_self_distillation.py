"""One peft model as student (adapters on) and teacher (adapters off)."""

import copy

import peft
import pytest
import torch

from fdd_kernels import Distiller, FDDConfig
from tests.support.hf_models import tiny_batch, tiny_model

CONFIG = FDDConfig.paper(num_layers=2, ce_weight=0.5)
KINDS = {
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3),
    "lora on the head": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "a trained copy of the head": peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "trainable tokens": peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4]
    ),
}


def adapted(kind):
    model = peft.get_peft_model(tiny_model("llama", depth=3, seed=1), copy.deepcopy(KINDS[kind]))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [
            module.disable_adapters
            for module in model.modules()
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
        ],
    )


@pytest.mark.parametrize("given", ["the peft model", "its base model"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_student_without_its_adapters(kind, given):
    model = adapted(kind).train()
    before = state_of(model)
    distiller = Distiller(
        model, model if given == "the peft model" else model.get_base_model(), CONFIG
    )
    assert state_of(model) == before
    batch = tiny_batch()
    torch.manual_seed(7)  # the same dropout
    terms = distiller(batch)
    terms.loss.backward()
    assert state_of(model) == before
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apart = Distiller(model, tiny_model("llama", depth=3, seed=1), CONFIG)
    torch.manual_seed(7)
    expected = apart(batch)
    expected.loss.backward()
    assert float(terms.output_kd.detach()) > 1e-3
    for one, other in zip(terms, expected, strict=True):
        torch.testing.assert_close(one, other)
    for name, parameter in model.named_parameters():
        assert (name in found) == (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(
                found[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_students_dropout_stays_on_in_training_and_off_in_evaluation():
    model = adapted("lora").train()
    distiller, batch = Distiller(model, model, CONFIG), tiny_batch()
    first, second = (float(distiller(batch).output_kd.detach()) for _ in range(2))
    assert first != second
    model.eval()
    with torch.no_grad():
        first, second = (float(distiller(batch).output_kd) for _ in range(2))
    assert first == second


def test_adapters_that_transformers_added_itself():
    model = tiny_model("llama", depth=3, seed=1)
    model.add_adapter(copy.deepcopy(KINDS["lora on the head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = Distiller(model, model, CONFIG)(tiny_batch())
    expected = Distiller(model, tiny_model("llama", depth=3, seed=1), CONFIG)(tiny_batch())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_another_peft_model_around_the_same_base_is_refused():
    model = adapted("lora")
    teacher = peft.PeftModel(
        model.get_base_model(), copy.deepcopy(KINDS["lora"]), adapter_name="other"
    )
    with pytest.raises(ValueError, match=r"PeftModel.*Load the base model twice"):
        Distiller(model, teacher, CONFIG)


def test_a_teacher_that_changes_with_its_student_is_named():
    model = tiny_model("llama", depth=3, seed=1)
    with pytest.warns(
        UserWarning, match=r"30 parameters that train, model.embed_tokens.weight for one.*deepcopy"
    ):
        Distiller(model, model, CONFIG)
    teacher = copy.deepcopy(model)
    teacher.model.layers[0] = model.model.layers[0]
    with pytest.warns(UserWarning, match="9 parameters"):
        distiller = Distiller(model.train(), teacher, CONFIG)
    distiller(tiny_batch())
    assert model.model.layers[0].training


@pytest.mark.filterwarnings("error:.*belong to student and teacher")
def test_what_two_models_share_may_be_frozen():
    model = tiny_model("llama", depth=3, seed=1)
    teacher = copy.deepcopy(model)
    model.lm_head = teacher.lm_head
    model.lm_head.requires_grad_(False)
    assert Distiller(model, teacher, CONFIG)(tiny_batch()).loss.isfinite()
