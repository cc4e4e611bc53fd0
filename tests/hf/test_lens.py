"""The lens computes logits as the model itself does, or says why it cannot."""

import functools

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from fdd_kernels.hf.model_reader import ModelReader, unwrap
from fdd_kernels.hf.transform import LogitTransform, configured_transform
from tests.support.hf_models import FAMILIES, tiny_batch, tiny_config, tiny_model

tiny_model_once = functools.cache(tiny_model)
# Two float32 evaluations of a tiny model with sums in another order: 6 blocks, whose longest sums
# have 4 x 32 addends, each rounded by half a unit of the larger number in either evaluation.
ROUNDING = 6 * 4 * 32 * torch.finfo(torch.float32).eps

# Families whose output_hidden_states start after the first block instead of with the embeddings.
WITHOUT_EMBEDDINGS = {"mamba"}
# Families whose blocks give something else than output_hidden_states: with the sequence first, or
# four streams.
OTHER_STATES = {"xlnet", "gemma3n"}


def assert_same_but_for_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equality of bits holds on one processor and not on another: a library may add in another
    order for another shape.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_equals_the_models_own(family):
    model, batch = tiny_model_once(family), tiny_batch(labels=False)
    lens = ModelReader(model)
    assert lens.depth == 6
    layers = (1, 2, 4, 5, 6)
    with torch.no_grad():
        states, final = lens.states(batch, layers)
        expected = model(**batch, output_hidden_states=True)
    # The last block's state through the tail, and the final state as it is, both give the logits.
    for state in (final, lens.read(states[-1])):
        assert_same_but_for_rounding(lens.logits(state), expected.logits)
    # Sampled states are the model's own; its last entry is already normed, so the last block is not
    # among them.
    offset = 1 if family in WITHOUT_EMBEDDINGS else 0
    if family in OTHER_STATES:
        return
    for layer, state in zip(layers[:-1], states):
        assert_same_but_for_rounding(state, expected.hidden_states[layer - offset])
        # Other layers differ by more than the bound, so it identifies the layer.
        others = [
            other for n, other in enumerate(expected.hidden_states[:-1]) if n != layer - offset
        ]
        assert (
            min((state - other).abs().max() for other in others)
            > 100 * ROUNDING * state.abs().max()
        )


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt_projections"])
def test_layer_0_is_what_enters_the_first_block(family):
    model, batch = tiny_model_once(family), tiny_batch(labels=False)
    with torch.no_grad():
        (state,), _ = ModelReader(model).states(batch, (0,))
        assert_same_but_for_rounding(
            state, model(**batch, output_hidden_states=True).hidden_states[0]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_reading_in_other_dtypes(family, dtype):
    model = tiny_model(family, dtype=dtype)
    lens, batch = ModelReader(model), tiny_batch(labels=False)
    with torch.no_grad():
        (state,), _ = lens.states(batch, (6,))
        logits = model(**batch).logits
    bound = 8 * torch.finfo(dtype).eps * float(logits.abs().max())
    assert (lens.logits(lens.read(state)) - logits).abs().max() <= bound


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("cohere", LogitTransform(0.0625)),
        ("granite", LogitTransform(1 / 6)),
        ("gemma2", LogitTransform(1.0, 0.5)),
        ("recurrent_gemma", LogitTransform(1.0, 0.5)),
        ("llama", LogitTransform()),
    ],
)
def test_scale_and_soft_cap_are_found(family, expected):
    assert ModelReader(tiny_model_once(family)).transform == expected
    assert configured_transform(tiny_config(family)) == expected


def test_scale_is_measured_where_the_config_does_not_tell():
    model = tiny_model("cohere")
    model.config.logit_scale = 3.0  # the model still uses the modules it was built with
    assert ModelReader(model).transform == LogitTransform(0.0625)


def test_large_soft_cap_is_found_although_small_logits_do_not_show_it():
    class Capped(type(tiny_model_once("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits * 2 / 30)
            return output

    model = tiny_model("llama")
    model.__class__ = Capped
    transform = ModelReader(model).transform
    assert transform.scale == pytest.approx(2.0, rel=1e-6)
    assert transform.softcap == pytest.approx(30.0, rel=1e-6)


def test_a_construction_leaves_mode_hooks_and_gradients_alone():
    model = tiny_model("llama")
    model.train()
    model.model.layers[2].eval()
    before = {name: module.training for name, module in model.named_modules()}
    ModelReader(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert hooks_of(model) == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_failing_construction_leaves_mode_and_hooks_alone():
    model = tiny_model("llama")
    model.train()
    model.model.norm.forward = lambda state: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ModelReader(model)
    assert all(module.training for module in model.modules())
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        torch.compile,
        lambda m: peft.get_peft_model(
            m, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM")
        ),
    ],
)
def test_wrappers_are_seen_through(wrap):
    model = tiny_model("llama")
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert ModelReader(wrapped).head is model.lm_head


class TestRefusals:
    """Every refusal names the model's role and the missing part."""

    def test_no_head(self):
        backbone = AutoModel.from_config(tiny_config("llama"))
        with pytest.raises(
            TypeError, match=r"student: LlamaModel is of the task embedding.*LMs.*fused_fdd_loss"
        ):
            ModelReader(backbone, "student")

    def test_not_a_transformers_model(self):
        with pytest.raises(TypeError, match="get_output_embeddings"):
            ModelReader(nn.Linear(3, 3), "student")

    def test_virtual_tokens(self):
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        with pytest.raises(TypeError, match="virtual tokens"):
            ModelReader(peft.get_peft_model(tiny_model("llama"), config))

    def test_logits_changed_after_the_head(self):
        class Shifted(type(tiny_model_once("llama"))):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.logits = output.logits + 0.5
                return output

        model = tiny_model("llama")
        model.__class__ = Shifted
        with pytest.raises(ValueError, match=r"student: Shifted turns .* no scale and soft cap"):
            ModelReader(model, "student")

    def test_something_between_the_norm_and_the_head(self):
        class Doubled(nn.Linear):
            def forward(self, state):
                return super().forward(2 * state)

        model = tiny_model("llama")
        model.lm_head.__class__ = Doubled
        with pytest.raises(
            ValueError, match=r"student: looked for .*LlamaDecoderLayer.*LlamaRMSNorm.* differs by"
        ):
            ModelReader(model, "student")

    def test_no_list_of_blocks(self):
        model = tiny_model("llama")
        model.config.num_hidden_layers = 5
        with pytest.raises(TypeError, match=r"num_hidden_layers=5 blocks, found lists of \[6\]"):
            ModelReader(model)


def test_head_that_is_no_call_of_its_module_is_still_compared():
    """Where the head's output cannot be replaced, config and comparison with the logits remain."""

    class Functional(type(tiny_model_once("granite"))):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask)
            output["logits"] = (
                nn.functional.linear(output.last_hidden_state, self.lm_head.weight) / self.divisor
            )
            return output

    model = tiny_model("granite")
    model.__class__, model.divisor = Functional, 6.0
    assert ModelReader(model).transform == LogitTransform(1 / 6)
    model.divisor = 3.0
    with pytest.raises(ValueError, match=r"differs by"):
        ModelReader(model)


def test_the_right_list_of_blocks_is_chosen_among_several_of_the_same_length():
    model = tiny_model("llama")
    extra = nn.ModuleList([nn.Identity() for _ in range(6)])
    modules = dict(model.model._modules)
    model.model._modules.clear()
    model.model._modules.update({"before": extra, **modules})
    assert ModelReader(model).blocks is model.model.layers


def test_states_of_a_block_that_does_not_run_are_an_error():
    model = tiny_model("llama")
    lens = ModelReader(model)
    model.model.config.num_hidden_layers = 3  # transformers runs layers[:num_hidden_layers]
    with pytest.raises(RuntimeError, match=r"blocks \[5\] did not run"):
        lens.states(tiny_batch(labels=False), (2, 5))
    assert hooks_of(model) == 0


def test_loaded_without_names(tmp_path):
    """A checkpoint from disk gives the same logits as the saved model."""
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ModelReader(loaded).transform == ModelReader(model).transform
