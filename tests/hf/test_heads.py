"""Heads that are adapted, copied or quantised: use the weight by which their own forward
multiplies.
"""

import warnings

import peft
import pytest
import torch
from torch import Tensor, nn

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.hf.heads import read_head
from fdd_kernels.hf.model_reader import ModelReader
from tests.support.hf_models import tiny_batch, tiny_model

LORA = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
CONFIG = FDDConfig.paper(
    student_layers=(1, 2), teacher_layers=(1, 2), beta=0.0, alpha=0.7, output_kd_weight=0.9
)

ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True},
    "lora_bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "dora": {"target_modules": ["down_proj", "lm_head"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trainable_tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 90]},
}


def adapted(kind: str, seed: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a tiny Llama with an adapter on its head, not at its initial zero."""
    base = tiny_model(
        "llama_tied" if kind == "trainable_tokens" else "llama", depth=3, seed=seed, dtype=dtype
    )
    if kind == "lora_bias":
        base.lm_head.bias = nn.Parameter(torch.zeros(len(base.lm_head.weight), dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on tied weights and biases
        model = peft.get_peft_model(base, peft.LoraConfig(**LORA, **ADAPTERS[kind]))
    return randomised(model.to(dtype))


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=0.1)
    return model.eval()


def probed(head: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear module, seen from outside: its answers to unit vectors."""
    with torch.no_grad():
        bias = head(torch.zeros(width, dtype=torch.float64))
        return (head(torch.eye(width, dtype=torch.float64)) - bias).T, bias


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense_loss(
    student: nn.Module, teacher: nn.Module, batch: dict, config: FDDConfig = CONFIG
) -> Tensor:
    """Output KD and trajectory from the models' own heads, called as modules; both models are tiny
    Llamas.
    """

    def log_probabilities(model: nn.Module, layers: tuple[int, ...]) -> list[Tensor]:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        output = base(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )
        lens = [base.lm_head(base.model.norm(output.hidden_states[layer])) for layer in layers]
        return [logits.log_softmax(-1) for logits in (*lens, output.logits)]

    ours = log_probabilities(student, config.student_layers)
    with torch.no_grad():
        theirs = log_probabilities(teacher, config.teacher_layers)
    counts = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counts[:, :-1] = batch["labels"][:, 1:] != -100
    kls = [(p.exp() * (p - q)).sum(-1)[counts].mean() for q, p in zip(ours, theirs)]
    return config.output_kd_weight * kls[-1] + config.alpha * sum(kls[:-1]) / len(kls[:-1])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapted_head_is_read_as_its_forward_computes(kind):
    model = adapted(kind)
    head = model.get_base_model().lm_head
    weight, bias = probed(head, 32)
    read = read_head(head, "student")
    torch.testing.assert_close(read.weight, weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        bias if read.bias is None else read.bias, bias, rtol=1e-12, atol=1e-13
    )
    plain = tiny_model(
        "llama_tied" if kind == "trainable_tokens" else "llama",
        depth=3,
        seed=1,
        dtype=torch.float64,
    )
    assert (weight - plain.lm_head.weight).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(read_head(head, "student").weight, plain.lm_head.weight)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_of_an_adapted_head_equal_the_dense_loss(kind):
    student, teacher, batch = (
        adapted(kind),
        tiny_model("llama", depth=3, seed=2, dtype=torch.float64),
        tiny_batch(),
    )
    loss = Distiller(student, teacher, CONFIG)(batch).loss
    loss.backward()
    found = gradients(student)
    student.zero_grad()
    expected = dense_loss(student, teacher, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == gradients(student).keys()
    assert any("lm_head" in name or "token" in name for name in found)
    # Llama's norms are float32 inside float64 models
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapted_teacher(kind):
    student, teacher, batch = (
        tiny_model("llama", depth=3, seed=2, dtype=torch.float64),
        adapted(kind),
        tiny_batch(),
    )
    loss = Distiller(student, teacher, CONFIG)(batch).loss
    loss.backward()
    torch.testing.assert_close(loss, dense_loss(student, teacher, batch), rtol=1e-6, atol=0)
    assert not gradients(teacher)


def test_several_active_adapters_add_up():
    model = peft.get_peft_model(
        tiny_model("llama", depth=3, dtype=torch.float64),
        peft.LoraConfig(**LORA, target_modules=["lm_head"]),
    )
    model.add_adapter(
        "second", peft.LoraConfig(r=2, lora_alpha=9, target_modules=["lm_head"], use_dora=True)
    )
    model.add_adapter("third", peft.LoraConfig(r=1, target_modules=["lm_head"]))
    model.add_adapter("idle", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.double()
    model.base_model.set_adapter(["default", "second", "third"])
    head = randomised(model).get_base_model().lm_head
    torch.testing.assert_close(
        read_head(head, "student").weight, probed(head, 32)[0], rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_adapter_is_not_added_again(kind):
    model = adapted(kind)
    head = model.get_base_model().lm_head
    weight = read_head(head, "student").weight
    model.merge_adapter()
    torch.testing.assert_close(read_head(head, "student").weight, weight, rtol=1e-12, atol=1e-13)
    with model.disable_adapter():  # peft's own forward undoes the merge here
        torch.testing.assert_close(read_head(head, "student").weight, head.get_base_layer().weight)
        assert not head.merged


def test_each_step_reads_the_adapter_as_it_is_now():
    student, teacher, batch = (
        adapted("lora"),
        tiny_model("llama", depth=3, seed=2, dtype=torch.float64),
        tiny_batch(),
    )
    distiller = Distiller(student, teacher, CONFIG)
    before = distiller(batch).loss.detach()
    with torch.no_grad():
        student.get_base_model().lm_head.lora_B["default"].weight.mul_(-3)
    after = distiller(batch).loss
    assert (after - before).abs() > 1e-3
    torch.testing.assert_close(after, dense_loss(student, teacher, batch), rtol=1e-6, atol=0)


def test_train_head_false_leaves_the_heads_adapter_alone():
    student, teacher = adapted("lora"), tiny_model("llama", depth=3, seed=2, dtype=torch.float64)
    Distiller(student, teacher, FDDConfig.paper(num_layers=2, train_head=False))(
        tiny_batch()
    ).loss.backward()
    assert gradients(student)
    assert not any("lm_head" in name for name in gradients(student))


def test_an_adapter_in_float32_on_a_bfloat16_head_is_not_rounded_away():
    """A change far below the weight's own rounding step still reaches the loss."""
    model = peft.get_peft_model(
        tiny_model("llama", depth=3, dtype=torch.bfloat16),
        peft.LoraConfig(**LORA, target_modules=["lm_head"]),
    )
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.lora_B["default"].weight.fill_(1e-6)
    assert head.lora_A["default"].weight.dtype == torch.float32
    change = read_head(head, "student").weight - head.base_layer.weight
    torch.testing.assert_close(change, head.get_delta_weight("default"), rtol=0, atol=1e-7)
    assert change.abs().max() > 1e-7
    terms = Distiller(model, tiny_model("llama", depth=3, seed=2), CONFIG)(tiny_batch())
    terms.loss.backward()
    assert head.lora_B["default"].weight.grad.abs().max() > 0


def test_dropout_of_the_heads_adapter_is_said_not_to_be_applied():
    model = peft.get_peft_model(
        tiny_model("llama", depth=3),
        peft.LoraConfig(**LORA, lora_dropout=0.25, target_modules=["lm_head"]),
    )
    distiller = Distiller(model, tiny_model("llama", depth=3, seed=2), CONFIG)
    model.train()
    with pytest.warns(
        UserWarning, match=r"student: lora_dropout=0\.25 of the LM head's adapter is not applied"
    ):
        distiller(tiny_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
        distiller(tiny_batch())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.LoHaConfig(r=2, target_modules=["lm_head"]), "loha"),
        (peft.OFTConfig(r=0, oft_block_size=8, target_modules=["lm_head"]), "oft"),
        (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3"),
        (peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10), "adalora"),
        (
            peft.LoraConfig(**LORA, target_modules=["lm_head"], alora_invocation_tokens=[3]),
            "ALoraLinearVariant",
        ),
    ],
)
def test_other_adapters_are_refused_by_name(config, kind):
    model = peft.get_peft_model(tiny_model("llama", depth=3), config)
    with pytest.raises(
        TypeError,
        match=rf"student: the LM head is a peft\.tuners\.(?s:.*){kind}(?s:.*)merge_and_unload",
    ):
        ModelReader(model if kind != "adalora" else model.base_model.model, "student")


class Quantised(Tensor):
    """Imitate torchao's tensors: int8 values and a scale per row, with a floating-point dtype."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, requires_grad: bool = False) -> "Quantised":
        return Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=scale.dtype, requires_grad=requires_grad
        )

    def __init__(self, values: Tensor, scale: Tensor, requires_grad: bool = False) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> "Quantised":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:
        return self.values.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors, _context, _size, _stride):
        return Quantised(tensors["values"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map(
            lambda a: Quantised.dequantize(a) if isinstance(a, Quantised) else a, args
        )
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        return function(*plain, **(kwargs or {}))


class Opaque(Quantised):
    """A quantised tensor without a way to dequantise it."""

    def dequantize(self) -> Tensor:
        raise NotImplementedError("no dequantize for this layout")


def quantise_head(model: nn.Module, kind: type = Quantised, requires_grad: bool = False) -> Tensor:
    """Quantise in place; return the weight that the head now represents."""
    quantised = kind.of(model.lm_head.weight.detach())
    model.lm_head.weight = nn.Parameter(quantised, requires_grad=requires_grad)
    return Quantised.dequantize(quantised)


class TestQuantised:
    def test_a_quantised_teachers_head_is_its_dequantised_weight(self):
        student, teacher, batch = (
            tiny_model("llama", depth=3, seed=1),
            tiny_model("llama", depth=3, seed=2),
            tiny_batch(),
        )
        plain = tiny_model("llama", depth=3, seed=2)
        original = plain.lm_head.weight.detach().clone()
        plain.lm_head.weight.data = quantise_head(teacher)
        assert 1e-4 < (plain.lm_head.weight - original).abs().max() < 1e-2
        found, expected = (Distiller(student, model, CONFIG)(batch) for model in (teacher, plain))
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=0)
        found.loss.backward()
        assert student.lm_head.weight.grad.abs().max() > 0

    def test_a_quantised_students_head_cannot_be_trained_but_frozen(self):
        student, teacher = (
            tiny_model("llama", depth=3, seed=1),
            tiny_model("llama", depth=3, seed=2),
        )
        quantise_head(student, requires_grad=True)
        with pytest.raises(
            ValueError,
            match=r"student's head is quantised and asks for gradient.*train_head=False.*LoRA",
        ):
            Distiller(student, teacher, CONFIG)
        Distiller(student, teacher, FDDConfig.paper(num_layers=2, train_head=False))(
            tiny_batch()
        ).loss.backward()
        assert student.lm_head.weight.grad is None
        student.lm_head.requires_grad_(False)
        Distiller(student, teacher, CONFIG)(tiny_batch()).loss.backward()
        assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0

    def test_a_trained_adapter_on_a_quantised_head(self):
        """QLoRA with the head in target_modules: the base is dequantised, the adapter learns."""
        student, teacher, batch = (
            tiny_model("llama", depth=3, seed=1),
            tiny_model("llama", depth=3, seed=2),
            tiny_batch(),
        )
        plain = tiny_model("llama", depth=3, seed=1)
        plain.lm_head.weight.data = quantise_head(student)
        losses, found = [], []
        for model in (student, plain):
            torch.manual_seed(5)
            model = randomised(
                peft.get_peft_model(model, peft.LoraConfig(**LORA, target_modules=["lm_head"]))
            )
            losses.append(Distiller(model, teacher, CONFIG)(batch).loss)
            losses[-1].backward()
            found.append(gradients(model))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        assert found[0].keys() == found[1].keys()
        assert found[0]
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-9)

    def test_what_cannot_be_dequantised_is_refused(self):
        model = tiny_model("llama", depth=3)
        quantise_head(model, Opaque)
        with pytest.raises(
            TypeError,
            match=r"teacher: .*Linear with a Opaque weight, which cannot be dequantised \(no deq",
        ):
            ModelReader(model, "teacher")

    def test_a_wrong_reading_is_noticed(self):
        """Compare the weight taken for a head with the logits of the model itself."""

        class Wrong(Quantised):
            def dequantize(self) -> Tensor:
                return super().dequantize() * 1.5

        model = tiny_model("llama", depth=3)
        quantise_head(model, Wrong)
        with pytest.raises(ValueError, match=r"teacher: looked for the blocks.* differs by"):
            ModelReader(model, "teacher")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_raw_storage_is_never_read(self, dtype):
        model = tiny_model("llama", depth=3)
        model.lm_head.weight = nn.Parameter(
            model.lm_head.weight.detach().to(dtype), requires_grad=False
        )
        with pytest.raises(
            TypeError, match=rf"teacher: .*Linear with a {dtype} weight.*torchao or bitsandbytes"
        ):
            ModelReader(model, "teacher")


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


class TestTorchao:
    """Real quantised models; `pip install torchao` runs these."""

    @pytest.fixture
    def quantise(self):
        quantization = pytest.importorskip(
            "torchao.quantization", reason="torchao is not installed: pip install torchao"
        )

        def quantise(model: nn.Module, kind: str) -> nn.Module:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = getattr(quantization, kind)()
                quantization.quantize_(
                    model, config, filter_fn=lambda module, _name: isinstance(module, nn.Linear)
                )
            return model

        return quantise

    @pytest.mark.parametrize(
        "kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_teacher_quantised_whole(self, quantise, kind, dtype):
        student, batch = tiny_model("llama", depth=3, seed=1), tiny_batch()
        original = tiny_model("llama", depth=3, seed=2, dtype=dtype)
        teacher = quantise(tiny_model("llama", depth=3, seed=2, dtype=dtype), kind)
        lens = ModelReader(teacher, "teacher")
        head = lens.read_head()
        assert head.storage == "quantised"
        assert type(head.weight) is Tensor
        assert 0 < relative_error(head.weight.float(), original.lm_head.weight.float()) < 0.01
        with torch.no_grad():
            logits = teacher(**tiny_batch(labels=False)).logits
            _, final = lens.states(tiny_batch(labels=False), ())
        assert relative_error(lens.logits(final).float(), logits.float()) < 0.02
        exact = Distiller(student, original, CONFIG)(batch).loss
        loss = Distiller(student, teacher, CONFIG)(batch).loss
        assert float((loss - exact).detach().abs() / exact.detach()) < 0.05
        loss.backward()
        assert student.lm_head.weight.grad.isfinite().all()

    def test_lora_on_a_quantised_head(self, quantise):
        student = quantise(tiny_model("llama", depth=3, seed=1), "Int8WeightOnlyConfig")
        base = read_head(student.lm_head, "student").weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            student = randomised(
                peft.get_peft_model(student, peft.LoraConfig(**LORA, target_modules=["lm_head"]))
            )
        head = student.get_base_model().lm_head
        read = read_head(head, "student")
        torch.testing.assert_close(read.weight, base + head.get_delta_weight("default"))
        Distiller(student, tiny_model("llama", depth=3, seed=2), CONFIG)(
            tiny_batch()
        ).loss.backward()
        assert head.lora_B["default"].weight.grad.abs().max() > 0


class TestBitsandbytes:
    """Real quantised layers on the CPU; `pip install bitsandbytes` runs these."""

    @pytest.fixture
    def bnb(self):
        return pytest.importorskip(
            "bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes"
        )

    def quantised_head(self, bnb, model: nn.Module, kind: str) -> nn.Module:
        linear = model.lm_head
        if kind == "int8":
            head = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
            )
            head.weight = bnb.nn.Int8Params(
                linear.weight.detach(), requires_grad=False, has_fp16_weights=False
            )
        else:
            head = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                quant_type=kind,
                compute_dtype=linear.weight.dtype,
            )
            head.weight = bnb.nn.Params4bit(
                linear.weight.detach(), requires_grad=False, quant_type=kind
            )
        model.lm_head = head.to("cpu")
        return model

    @pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("nf4", 0.12), ("fp4", 0.15)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_teachers_head(self, bnb, kind, error, dtype):
        student, batch = tiny_model("llama", depth=3, seed=1), tiny_batch()
        # bitsandbytes quantises blocks of 64 numbers; on the CPU it is wrong for narrower rows.
        options = {"depth": 3, "seed": 2, "dtype": dtype, "hidden_size": 64}
        original = tiny_model("llama", **options)
        teacher = self.quantised_head(bnb, tiny_model("llama", **options), kind)
        assert teacher.lm_head.weight.dtype in (torch.int8, torch.uint8)
        for _ in range(2):  # bitsandbytes moves its scales at the first forward
            lens = ModelReader(teacher, "teacher")
            head = lens.read_head()
            assert head.storage == "quantised"
            assert 0 < relative_error(head.weight.float(), original.lm_head.weight.float()) < error
        with torch.no_grad():
            logits = teacher(**tiny_batch(labels=False)).logits
            _, final = lens.states(tiny_batch(labels=False), ())
        assert relative_error(lens.logits(final).float(), logits.float()) < 0.02
        loss = Distiller(student, teacher, CONFIG)(batch).loss
        loss.backward()
        assert student.lm_head.weight.grad.isfinite().all()


def test_a_plain_head_is_the_parameter_itself():
    model = tiny_model("phi_head_bias", depth=3)
    head = read_head(model.lm_head, "student")
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias
    assert head.storage == "parameter"
