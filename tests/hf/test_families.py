"""A model's lens is its own path from the last block to the logits; models without one are
refused.
"""

import copy
import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed import HashStore
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForSequenceClassification,
    BertLMHeadModel,
    LlamaForSequenceClassification,
    MllamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetLMHeadModel,
)

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.hf.model_reader import ModelReader
from tests.support.hf_models import VOCAB, tiny_batch, tiny_config, tiny_model
from tests.support.tasks import task_model

CONFIG = FDDConfig.paper(
    student_layers=(1, 2), teacher_layers=(1, 2), beta=0.0, alpha=0.7, output_kd_weight=0.9
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_hidden_layers": 3,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE = 96  # the token of an image patch

# How a reader of each model's source would turn a state (batch, sequence, width) into logits.
READINGS = {
    "bert": lambda m, h: m.cls(h),
    "roberta": lambda m, h: m.lm_head(h),
    "electra": lambda m, h: m.generator_lm_head(m.generator_predictions(h)),
    "rembert": lambda m, h: m.cls(h),
    "modernbert_decoder": lambda m, h: m.decoder(m.lm_head(m.model.final_norm(h))),
    "minicpm3": lambda m, h: m.lm_head(m.model.norm(h) / (32 / 8)),
    "openai_gpt": lambda m, h: m.lm_head(h),
    "llama4": lambda m, h: m.lm_head(m.model.norm(h)),
}


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def in_place_of_the_last(model: nn.Module, last: nn.Module, state: Tensor, batch: dict) -> Tensor:
    """Return the model's own logits when its last block outputs `state`."""

    def give(_module, _args, output):
        return state if isinstance(output, Tensor) else type(output)([state, *output[1:]])

    with last.register_forward_hook(give):
        return model(**batch).logits


def dense_loss(
    student: nn.Module, teacher: nn.Module, blocks: str, batch: dict, reading=None
) -> Tensor:
    """Compute output KD and trajectory of CONFIG densely, running whole models; `blocks` is the
    path of their blocks.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    def log_probabilities(model: nn.Module) -> list[Tensor]:
        states, modules = {}, model.get_submodule(blocks)

        def keep(layer, output):
            states.setdefault(layer, output if isinstance(output, Tensor) else output[0])

        hooks = [
            modules[n - 1].register_forward_hook(lambda _m, _a, out, n=n: keep(n, out))
            for n in CONFIG.student_layers
        ]
        output = model(**inputs, output_hidden_states=reading is not None)
        for hook in hooks:
            hook.remove()
        if reading is None:
            lens = [
                in_place_of_the_last(model, modules[-1], states[n], inputs)
                for n in CONFIG.student_layers
            ]
        else:
            lens = [reading(model, output.hidden_states[n]) for n in CONFIG.student_layers]
        return [logits.log_softmax(-1) for logits in (*lens, output.logits)]

    ours = log_probabilities(student)
    with torch.no_grad():
        theirs = log_probabilities(teacher)
    counts = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counts[:, :-1] = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, :-1] != 0)
    kls = [(p.exp() * (p - q)).sum(-1)[counts].mean() for q, p in zip(ours, theirs)]
    return CONFIG.output_kd_weight * kls[-1] + CONFIG.alpha * sum(kls[:-1]) / len(kls[:-1])


def require_dense(
    student: nn.Module,
    teacher: nn.Module,
    blocks: str,
    batch: dict,
    reading=None,
    rtol: float = 1e-6,
) -> None:
    """Compare loss and all gradients of the Distiller with the dense loss."""
    loss = Distiller(student, teacher, CONFIG)(batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected = dense_loss(student, teacher, blocks, batch, reading)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0, check_dtype=False)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() >= found.keys()
    for name, gradient in gradients.items():
        mine = found.get(name, torch.zeros_like(gradient))
        bound = rtol * 10 * max(1e-3, float(gradient.abs().max()))
        assert (mine - gradient).abs().max() <= bound, name


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("bert", "bert.encoder.layer"),
        ("roberta", "roberta.encoder.layer"),
        ("electra", "electra.encoder.layer"),
        ("rembert", "rembert.encoder.layer"),
        ("modernbert_decoder", "model.layers"),
        ("minicpm3", "model.layers"),
        ("openai_gpt", "transformer.h"),
        ("xlnet", "transformer.layer"),
        ("llama4", "model.layers"),
        ("gemma3n", "model.layers"),
        ("gemma2", "model.layers"),
        ("opt_projections", "model.decoder.layers"),
    ],
)
def test_loss_and_gradients_equal_the_dense_loss(family, blocks):
    student, teacher = (
        tiny_model(family, depth=3, seed=seed, dtype=torch.float64) for seed in (1, 2)
    )
    exact = family not in (
        "llama4",
        "minicpm3",
        "gemma3n",
        "gemma2",
    )  # norms and the rest in float32, whatever the dtype
    require_dense(
        student, teacher, blocks, tiny_batch(), READINGS.get(family), rtol=1e-6 if exact else 1e-5
    )


def test_families_can_be_mixed():
    terms = Distiller(
        tiny_model("bert", depth=3),
        tiny_model("llama", depth=4, seed=2),
        FDDConfig.paper(num_layers=2),
    )(tiny_batch())
    terms.loss.backward()
    assert torch.isfinite(terms.loss)


@pytest.mark.parametrize("family", ["bert", "minicpm3", "gemma3n"])
def test_without_the_final_norm_the_rest_still_applies(family):
    lens = ModelReader(tiny_model(family, depth=3))
    (state,), _ = lens.states(tiny_batch(labels=False), (2,))
    read = lens.read(state, apply_final_norm=False)
    expected = {
        "bert": lambda: lens.model.cls.predictions.transform(state),
        "minicpm3": lambda: state / (32 / 8),
        "gemma3n": lambda: read,  # its four streams are merged
    }[family]()
    torch.testing.assert_close(read, expected)
    assert lens.logits(read).shape == (2, 9, VOCAB)


def mllama() -> nn.Module:
    config = AutoConfig.for_model("mllama_text_model", **TEXT, cross_attention_layers=[1])
    torch.manual_seed(0)
    return noisy(MllamaForCausalLM(config))


class TestWithoutABackboneOfItsOwn:
    """Models whose forward does more than run one module beside the head: they run as a whole, up
    to the head.
    """

    def test_no_logits_and_no_more_than_is_asked_for(self):
        lens, calls = ModelReader(mllama()), []
        assert lens.backbone is lens.model
        hooks = [
            m.register_forward_hook(lambda m, *_: calls.append(m))
            for m in (lens.head, lens.blocks[2])
        ]
        _, final = lens.states(tiny_batch(labels=False), (1,))
        assert final.shape == (2, 9, 32)
        assert calls == [lens.blocks[2]]
        lens.states(tiny_batch(labels=False), (1,), final=False)
        assert calls == [lens.blocks[2]]
        for hook in hooks:
            hook.remove()

    def test_a_block_that_text_leaves_out_changes_nothing(self):
        """The second block is for images alone."""
        lens = ModelReader(mllama())
        (one, two), _ = lens.states(tiny_batch(labels=False), (1, 2))
        torch.testing.assert_close(one, two, rtol=0, atol=0)

    def test_under_distributed_data_parallel(self):
        student, teacher = mllama(), tiny_model("llama", depth=3, seed=2)
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            expected = Distiller(copy.deepcopy(student), teacher, CONFIG)(tiny_batch()).loss
            wrapped = nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
            loss = Distiller(student, teacher, CONFIG)(tiny_batch(), student=wrapped).loss
            loss.backward()
        finally:
            torch.distributed.destroy_process_group()
        torch.testing.assert_close(loss, expected)
        assert student.lm_head.weight.grad.abs().max() > 0
        assert student.forward.__func__ is MllamaForCausalLM.forward


def vision_language(kind: str, seed: int = 0) -> tuple[nn.Module, dict, str]:
    """A tiny vision-language model, a batch with an image, and where its blocks are."""
    torch.manual_seed(seed)
    ids = tiny_batch(vocab_size=IMAGE)["input_ids"]
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    more: dict = {"pixel_values": pixels}
    if kind == "llava":
        config = AutoConfig.for_model(
            "llava",
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_id=IMAGE,
            image_token_index=IMAGE,
        )
        model, blocks, tokens = (
            transformers.LlavaForConditionalGeneration(config),
            "model.language_model.layers",
            4,
        )
    elif kind == "gemma3":
        config = AutoConfig.for_model(
            "gemma3",
            text_config={"model_type": "gemma3_text", **TEXT, "head_dim": 8},
            mm_tokens_per_image=4,
            vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
            image_token_id=IMAGE,
            image_token_index=IMAGE,
            boi_token_index=95,
            eoi_token_index=94,
        )
        model, blocks, tokens = (
            transformers.Gemma3ForConditionalGeneration(config),
            "model.language_model.layers",
            4,
        )
    else:
        config = AutoConfig.for_model(
            "llama4",
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            text_config={
                "model_type": "llama4_text",
                **TEXT,
                "head_dim": 8,
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
            },
            vision_config={
                "model_type": "llama4_vision_model",
                **VISION,
                "intermediate_size": 64,
                "pixel_shuffle_ratio": 0.5,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "vision_output_dim": 16,
            },
        )
        model, blocks, tokens = (
            transformers.Llama4ForConditionalGeneration(config),
            "language_model.model.layers",
            1,
        )
    ids[:, 1 : 1 + tokens] = IMAGE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    batch["labels"] = ids.masked_fill(ids == IMAGE, -100)
    return noisy(model, seed), batch, blocks


@pytest.mark.parametrize("kind", ["llava", "gemma3", "llama4"])
def test_vision_language_models_with_images(kind):
    (student, batch, blocks), (teacher, *_) = vision_language(kind, 1), vision_language(kind, 2)
    distiller = Distiller(student, teacher, CONFIG)
    other = batch | {"pixel_values": -2 * batch["pixel_values"]}
    assert (distiller(batch).loss - distiller(other).loss).abs() > 1e-6  # the image is seen
    words = tiny_batch(vocab_size=IMAGE)["input_ids"]
    for one in (
        batch,
        {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words},
    ):
        student.zero_grad()
        require_dense(student, teacher, blocks, one, rtol=1e-4)


def tiny_whisper() -> WhisperConfig:
    sides = ("encoder", "decoder")
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    of_sides = {f"{side}_{name}": size for side in sides for name, size in sizes.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return WhisperConfig(d_model=16, vocab_size=VOCAB, **of_sides, **tokens)


class TestWithoutLens:
    """The reader refuses, naming the side and the supported kinds."""

    def refused(self, model: nn.Module, match: str) -> None:
        for side in ("student", "teacher"):
            with pytest.raises(
                TypeError, match=rf"(?s){side}: {match}.*Supported are .*causal LMs, masked LMs"
            ):
                ModelReader(model.eval(), side)

    def bert(self, kind: type, **changes) -> nn.Module:
        fields = {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        return noisy(kind(BertConfig(**fields, vocab_size=VOCAB, **changes)))

    def test_a_model_of_unknown_name_that_looks_ahead(self):
        class Diffusing(type(tiny_model("llama", depth=3))):
            def forward(self, input_ids, attention_mask=None, **kwargs):
                rows, length = input_ids.shape
                return super().forward(
                    input_ids,
                    attention_mask=input_ids.new_zeros(rows, 1, length, length).float(),
                    **kwargs,
                )

        model = tiny_model("llama", depth=3)
        model.__class__ = Diffusing
        self.refused(
            model, "Diffusing is no causal LM .its predictions change with the tokens after them"
        )

    def test_classification(self):
        for model in (
            self.bert(BertForSequenceClassification),
            LlamaForSequenceClassification(tiny_config("llama", depth=3)),
        ):
            task = "sequence_classification"
            self.refused(model, f"{type(model).__name__} is of the task {task}")

    def test_pretraining_heads(self):
        model = self.bert(BertForPreTraining)
        with pytest.raises(TypeError, match=r"BertForPreTrainingOutput without logits: load"):
            ModelReader(model)

    def test_speech(self):
        model = WhisperForConditionalGeneration(tiny_whisper())
        with pytest.raises(TypeError, match=r"student: Whisper.*-decoder of input_features"):
            ModelReader(model, "student")

    def test_a_head_that_is_no_call_of_its_module(self):
        """Without `legacy`, get_output_embeddings of DeBERTa v2 is a layer before its head."""
        model = task_model("deberta_v2", legacy=False, dtype=torch.float32)
        with pytest.raises(ValueError, match=r"has shape \(2, 3, 32\) instead of \(2, 3, 97\)"):
            ModelReader(model)

    def test_multiple_choice(self):
        match = "BertForMultipleChoice.get_output_embeddings.. gives None"
        self.refused(self.bert(BertForMultipleChoice), match)

    @pytest.mark.parametrize("kind", ["bert", "xlnet"])
    def test_a_causal_lm_configured_to_look_ahead_is_warned_of(self, kind):
        model = (
            self.bert(BertLMHeadModel)
            if kind == "bert"
            else noisy(XLNetLMHeadModel(tiny_config("xlnet", depth=3)))
        )
        with pytest.warns(
            UserWarning,
            match=f"student: the predictions of {type(model).__name__}.* change with the tokens",
        ):
            lens = ModelReader(model, "student")
        assert lens.depth == 3

    def test_a_causal_lm_is_not_warned_of(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            ModelReader(tiny_model("bert", depth=3))
