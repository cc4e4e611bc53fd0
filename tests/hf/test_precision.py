"""Students in 16 bits: float16 with a gradient scaler, bfloat16, with LoRA, checkpointing and
accumulation; torch.compile.
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fdd_kernels import Distiller, FDDConfig
from tests.support.hf_models import tiny_batch, tiny_model
from tests.support.task_models import pair, task_batch
from tests.support.training import examples, lora_student, same_parameters, trainer


def distiller(student, backend="auto"):
    return Distiller(
        student, tiny_model("gpt2", depth=3, seed=2), FDDConfig.paper(num_layers=2, backend=backend)
    )


def gradients(backend, scale=None):
    """Gradients of one batch, of the float32 weights; in float16 and unscaled again, if there is a
    scale.
    """
    student = tiny_model("llama", depth=3, seed=1).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0)
    states = []
    student.model.norm.register_forward_hook(lambda _m, _a, output: states.append(output.dtype))
    with torch.autocast("cpu", torch.float16, enabled=scale is not None):
        loss = distiller(student, backend)(tiny_batch()).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return loss.detach(), {n: p.grad for n, p in student.named_parameters()}


def test_float16_gradients_do_not_depend_on_the_scale(backend):
    """Scales are powers of two: exact for all numbers within float16's normal range."""
    exact_loss, exact = gradients("reference", 2.0**10)
    runs = {scale: gradients(backend, scale) for scale in (2.0**10, 2.0**12)}
    (loss, found), (other_loss, others) = runs.values()
    assert torch.equal(loss, other_loss)
    for name, expected in exact.items():
        largest = float(expected.abs().max())
        # The dense loss of the same rounded operands; the backward pass rounds each gradient of an
        # activation to 11 bits, through a few layers.
        assert float((found[name] - expected).norm()) < 2e-3 * float(expected.norm()) + 1e-12, name
        # Only numbers below 2**-14 at the smaller scale may differ, each by one rounding of 2**-24
        # / scale.
        torch.testing.assert_close(
            found[name],
            others[name],
            rtol=2e-3,
            atol=1e-5 * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=0)


def test_a_step_that_overflows_is_skipped_and_the_scale_halved():
    student = tiny_model("llama", depth=3, seed=1).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    distil = distiller(student)
    for factor, moved in ((0.5, False), (0.5 * 2.0**-50, True)):
        before = student.lm_head.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            loss = distil(tiny_batch()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(None if not moved else 2.0**60 * factor)
        optimizer.zero_grad()
        assert torch.equal(before, student.lm_head.weight) == (not moved)
        if not moved:
            assert scaler.get_scale() == 2.0**59
            scaler.update(2.0**10)


@pytest.fixture
def accelerator():
    """accelerate with mixed precision; its state belongs to the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_models_that_accelerate_has_prepared_already(accelerator, task):
    """Its forwards round to bfloat16; the parts that are checked against them do not."""
    config = FDDConfig.paper(num_layers=1)
    if task == "causal_lm":
        models, batch = (tiny_model("llama", depth=3), tiny_model("gpt2", depth=3)), tiny_batch()
    else:
        models, batch = pair("gpt2", task, dtype=torch.float32), task_batch(task)
        config = FDDConfig.paper(num_layers=1, space="feature", trajectory="mse", beta=0.0)
    torch.manual_seed(0)  # of the projection
    before = Distiller(*models, config)
    prepared = [accelerator.prepare_model(model, evaluation_mode=True) for model in models]
    wrapped = [model.forward for model in prepared]
    torch.manual_seed(0)
    after = Distiller(*prepared, config)
    assert [model.forward for model in prepared] == wrapped
    assert torch.equal(after(batch).loss, before(batch).loss)


@pytest.mark.parametrize(
    "dtype", [{}, pytest.param({"bf16": True}, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_lora_accumulation_checkpointing_and_evaluation_together(tmp_path, dtype):
    rows, held_out = examples([12, 7, 9, 5] * 16), examples([12] * 8, seed=5)
    run = trainer(
        tmp_path,
        train=rows,
        held_out=held_out,
        student=lora_student(),
        config=FDDConfig.paper(num_layers=2),
        max_steps=12,
        learning_rate=4e-2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        **dtype,
    )
    frozen = {n: p.detach().clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.95 * before
    assert all(torch.equal(p, frozen[n]) for n, p in run.model.named_parameters() if n in frozen)


class Counter:
    """A compiler backend that counts its graphs and runs them unchanged."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("where", ["student", "call", "teacher too"])
def test_a_compiled_student_computes_the_same(where):
    expected = tiny_model("llama", depth=3, seed=1).train()
    distiller(expected)(tiny_batch()).loss.backward()
    torch._dynamo.reset()
    student, teacher, counter = (
        tiny_model("llama", depth=3, seed=1).train(),
        tiny_model("gpt2", depth=3, seed=2),
        Counter(),
    )
    compiled = torch.compile(student, backend=counter)
    config = FDDConfig.paper(num_layers=2)
    if where == "call":  # as a Trainer passes it
        terms = Distiller(student, teacher, config)(tiny_batch(), student=compiled)
    else:
        teacher = torch.compile(teacher, backend=counter) if where == "teacher too" else teacher
        terms = Distiller(compiled, teacher, config)(tiny_batch())
    assert counter.graphs >= (2 if where == "teacher too" else 1)
    terms.loss.backward()
    for (name, p), (_, q) in zip(student.named_parameters(), expected.named_parameters()):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
def test_trainer_compiles(tmp_path):
    rows = examples([9] * 8)
    plain = trainer(tmp_path, train=rows, max_steps=2)
    plain.train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = trainer(
        tmp_path, train=rows, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager"
    )
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    same_parameters(compiled.model, plain.model, rtol=1e-4, atol=1e-6)
    compiled.save_model(str(tmp_path / "student"))
    reloaded = type(plain.model).from_pretrained(tmp_path / "student")
    same_parameters(reloaded, compiled.model, rtol=0, atol=0)
