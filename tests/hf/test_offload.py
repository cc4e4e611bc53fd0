"""Teachers that do not fit: stopped early, offloaded by accelerate, in lower precision; memory
held.
"""

import gc
import weakref

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.hf.heads import read_head
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.offload import device_of, has_place, is_offloaded
from fdd_kernels.integrations import FDDTrainer
from tests.support.hf_models import tiny_batch, tiny_model

FULL = FDDConfig.paper(num_layers=3, ce_weight=0.5)  # layers 1, 2, 3 of 4 and 2, 4, 6 of 8
DYNAMICS = FDDConfig.paper(num_layers=3, output_kd_weight=0.0, ce_weight=0.5)


def models(
    student: str = "llama", teacher: str = "llama", **teacher_options
) -> tuple[nn.Module, nn.Module]:
    return tiny_model(student, depth=4, seed=1), tiny_model(
        teacher, depth=8, seed=2, **teacher_options
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_calls(modules) -> list[int]:
    """How often each module runs to its end from now on."""
    calls = [0] * len(modules)

    def count(index):
        def hook(*_):
            calls[index] += 1

        return hook

    for index, module in enumerate(modules):
        module.register_forward_hook(count(index))
    return calls


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


class TestEarlyStop:
    @pytest.mark.parametrize("teacher", ["llama", "gpt2", "opt_projections", "mamba"])
    def test_the_teacher_stops_after_its_last_sampled_layer(self, teacher):
        student, theirs = models(teacher=teacher)
        batch = tiny_batch()
        whole, stopping = Distiller(student, theirs, FULL), Distiller(student, theirs, DYNAMICS)
        expected = whole(batch)
        with torch.no_grad():
            logits = theirs(**tiny_batch(labels=False)).logits
        calls = count_calls(stopping.teacher.reader.blocks)
        terms = stopping(batch)
        assert calls == [1] * 6 + [0] * 2
        # Up to the order of sums: with one state fewer a backend's GEMMs have other shapes.
        for name in ("trajectory", "derivative", "ce"):
            torch.testing.assert_close(
                getattr(terms, name), getattr(expected, name), rtol=1e-5, atol=1e-6
            )
        with torch.no_grad():
            torch.testing.assert_close(
                theirs(**tiny_batch(labels=False)).logits, logits, rtol=0, atol=0
            )

    @pytest.mark.parametrize(
        ("options", "runs"),
        [
            ({"output_kd_weight": 0.0}, 6),
            ({"output_kd_weight": 0.0, "output_in_dynamics": True}, 8),
            ({"output_kd_weight": 1.0}, 8),
            ({"alpha": 0.0, "beta": 0.0}, 8),
            ({"alpha": 0.0, "beta": 0.0, "output_kd_weight": 0.0, "ce_weight": 1.0}, 0),
            (
                {
                    "output_kd_weight": 0.0,
                    "student_layers": (0,),
                    "teacher_layers": (0,),
                    "beta": 0.0,
                },
                0,
            ),
        ],
    )
    def test_as_many_blocks_run_as_the_loss_needs(self, options, runs):
        student, teacher = models()
        distiller = Distiller(student, teacher, FDDConfig.paper(**{"num_layers": 3, **options}))
        calls = count_calls(distiller.teacher.reader.blocks)
        assert distiller(tiny_batch()).loss.isfinite()
        assert calls == [1] * runs + [0] * (8 - runs)

    @pytest.mark.parametrize("checkpointing", [None, False, True])
    def test_the_student_stops_too_and_its_gradients_are_the_same(self, checkpointing):
        student, teacher = models()
        config = FDDConfig.paper(num_layers=3, output_kd_weight=0.0)
        distiller = Distiller(student, teacher, config)
        states, _ = distiller.student.states(
            tiny_batch(), distiller.student_layers, read=distiller.student.read
        )
        assert len(states) == 3
        # negligible
        whole = Distiller(student, teacher, FDDConfig.paper(num_layers=3, output_kd_weight=1e-30))
        whole(tiny_batch()).loss.backward()
        expected = gradients(student)
        student.zero_grad()
        student.train()
        if checkpointing is not None:
            student.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": checkpointing}
            )
        calls = count_calls(distiller.student.blocks[3:])
        distiller(tiny_batch()).loss.backward()
        assert calls == [0]
        found = gradients(student)
        assert not any(".layers.3." in name for name in found)
        same(found, {name: g for name, g in expected.items() if ".layers.3." not in name})

    def test_states_without_the_final_one_are_refused_where_it_is_needed(self):
        student, teacher = models()
        stopping, whole = Distiller(student, teacher, DYNAMICS), Distiller(student, teacher, FULL)
        states = stopping.teacher_states(tiny_batch())
        assert [state is None for state in states] == [False, False, False, True]
        with pytest.raises(ValueError, match="teacher_states has no final state"):
            whole(tiny_batch(), teacher_states=states)
        shared = stopping(tiny_batch(), teacher_states=whole.teacher_states(tiny_batch()))
        torch.testing.assert_close(shared.loss, stopping(tiny_batch()).loss)

    def test_an_error_inside_the_teacher_is_not_taken_for_a_stop(self):
        student, teacher = models()
        distiller = Distiller(student, teacher, DYNAMICS)
        teacher.model.layers[2].mlp.forward = lambda state: 1 / 0
        with pytest.raises(ZeroDivisionError):
            distiller(tiny_batch())
        assert not any(module._forward_pre_hooks for module in teacher.modules())


OFFLOADS = ["cpu", "disk", "disk_map", "from_pretrained"]


def offloaded(kind: str, folder, family: str = "llama", **options) -> nn.Module:
    """The teacher of `models`, its weights elsewhere."""
    teacher = tiny_model(family, depth=8, seed=2, **options)
    if kind == "cpu":
        return accelerate.cpu_offload(teacher, execution_device=torch.device("cpu"))
    if kind == "disk":
        return accelerate.disk_offload(
            teacher, folder / "weights", execution_device=torch.device("cpu")
        )
    if kind == "disk_map":
        device_map = {
            "model.embed_tokens": "cpu",
            "model.rotary_emb": "cpu",
            "model.norm": "disk",
            "lm_head": "disk",
        }
        device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(8)}
        return accelerate.dispatch_model(teacher, device_map, offload_dir=folder / "weights")
    teacher.save_pretrained(folder / "checkpoint")
    return AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint",
        device_map={"": "disk"},
        offload_folder=folder / "weights",
        attn_implementation="eager",
    )


def on_meta(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize("config", [FULL, DYNAMICS])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_offloaded_teacher_gives_the_same_step(tmp_path, kind, config):
    student, plain = models()
    terms = Distiller(student, plain, config)(tiny_batch())
    terms.loss.backward()
    expected = gradients(student)
    student.zero_grad()

    teacher = offloaded(kind, tmp_path)
    away = on_meta(teacher)
    assert "lm_head.weight" in away
    assert "model.layers.7.mlp.up_proj.weight" in away
    distiller = Distiller(student, teacher, config)
    assert distiller.teacher.reader.read_head().storage == "offloaded"
    for _ in range(2):
        found = distiller(tiny_batch())
        torch.testing.assert_close(torch.stack(found), torch.stack(terms), rtol=0, atol=0)
        found.loss.backward()
        same(gradients(student), expected)
        student.zero_grad()
        assert on_meta(teacher) == away, "weights that were brought in stay in memory"
    with torch.no_grad():
        torch.testing.assert_close(
            teacher(**tiny_batch(labels=False)).logits, plain(**tiny_batch(labels=False)).logits
        )


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "phi_head_bias", "opt_projections"])
def test_offloaded_families(tmp_path, family):
    """Tied heads, heads with a bias and projections before the head."""
    student, plain = models(teacher=family)
    teacher = offloaded("disk", tmp_path, family)
    found, expected = (Distiller(student, model, FULL)(tiny_batch()) for model in (teacher, plain))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=0)


def test_a_stop_sends_the_weights_of_the_modules_around_it_out_again():
    """Modules whose forward the stop interrupts had brought in weights of their own."""
    student, plain = models()
    expected = Distiller(student, plain, DYNAMICS)(tiny_batch())
    teacher = tiny_model("llama", depth=8, seed=2)
    teacher.model.register_parameter("own", nn.Parameter(torch.ones(3)))
    accelerate.cpu_offload(teacher, execution_device=torch.device("cpu"))
    distiller = Distiller(student, teacher, DYNAMICS)
    seen = []
    distiller.teacher.reader.blocks[5].register_forward_hook(
        lambda *_: seen.append(teacher.model.own.is_meta)
    )
    torch.testing.assert_close(
        torch.stack(distiller(tiny_batch())), torch.stack(expected), rtol=0, atol=0
    )
    assert seen == [False]
    assert on_meta(teacher) == {name for name, _ in teacher.named_parameters()}


def test_an_offloaded_teacher_in_bfloat16(tmp_path):
    """States and head stay in bfloat16; the float32 student's loss equals that of the plain
    bfloat16 teacher.
    """
    student, plain = models(dtype=torch.bfloat16)
    exact = Distiller(student, models()[1], FULL)(tiny_batch()).loss
    teacher = offloaded("disk", tmp_path, dtype=torch.bfloat16)
    distiller = Distiller(student, teacher, FULL)
    found, expected = distiller(tiny_batch()), Distiller(student, plain, FULL)(tiny_batch())
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=0)
    assert {state.dtype for state in distiller.teacher_states(tiny_batch())} == {torch.bfloat16}
    assert found.loss.dtype == torch.float32
    # The teacher's weights and states have 8 significant bits: half a step is 2^-9 of each of its
    # states.
    assert 0 < (found.loss - exact).abs() < 8 * 2**-9 * exact


def test_an_offloaded_students_head_cannot_be_trained():
    student, teacher = models()
    accelerate.cpu_offload(student.lm_head, execution_device=torch.device("cpu"))
    assert is_offloaded(student.lm_head)
    with pytest.raises(ValueError, match="student's head is offloaded and asks for gradient"):
        Distiller(student, teacher, FULL)
    Distiller(student, teacher, FDDConfig.paper(num_layers=3, train_head=False))(
        tiny_batch()
    ).loss.backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_a_head_with_several_hooks():
    model = tiny_model("llama", depth=3)
    weight = model.lm_head.weight.detach().clone()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    add_hook_to_module(model.lm_head, AlignDevicesHook(io_same_device=True), append=True)
    head = read_head(model.lm_head, "teacher")
    torch.testing.assert_close(head.weight, weight, rtol=0, atol=0)
    assert model.lm_head.weight.is_meta
    assert ModelReader(model).depth == 3


def test_the_teachers_batch_goes_where_the_teacher_computes():
    """The hook's device takes precedence over the weights' "meta"."""
    teacher = accelerate.cpu_offload(
        tiny_model("llama", depth=3), execution_device=torch.device("cpu")
    )
    assert on_meta(teacher)
    assert device_of(teacher.model) == torch.device("cpu")
    assert device_of(tiny_model("gpt2", depth=3).transformer) == torch.device("cpu")


class TestMemory:
    def test_raw_states_are_freed_as_they_are_read(self):
        student, teacher = models()
        distiller = Distiller(student, teacher, FULL)
        raw, alive = [], []

        def keep(_module, _args, output):
            raw.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

        def count(*_):
            alive.append(sum(reference() is not None for reference in raw))

        for block in distiller.teacher.reader.blocks:
            block.register_forward_hook(keep)
            block.register_forward_pre_hook(count)
        states = distiller.teacher_states(tiny_batch())
        assert len(states) == 4
        assert max(alive) <= 1  # the state on its way into the next block
        assert not any(reference() is not None for reference in raw)

    @pytest.mark.parametrize("kind", ["disk", "bfloat16", "plain"])
    def test_nothing_of_the_teacher_is_left_after_a_step(self, tmp_path, kind):
        """No state and no head, once the loss has been differentiated: widths of 48 belong to the
        teacher alone.
        """
        width = {"hidden_size": 48, "num_attention_heads": 4}
        student = tiny_model("llama", depth=4, seed=1)
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        teacher = tiny_model("llama", depth=8, seed=2, dtype=dtype, intermediate_size=40, **width)
        if kind == "disk":
            accelerate.disk_offload(
                teacher, tmp_path / "weights", execution_device=torch.device("cpu")
            )
        distiller = Distiller(student, teacher, FULL)

        def teachers() -> int:
            gc.collect()
            return sum(
                issubclass(type(o), Tensor) and not o.is_meta and o.ndim >= 2 and o.shape[-1] == 48
                for o in gc.get_objects()
            )

        before = teachers()
        terms = distiller(tiny_batch())
        terms.loss.backward()
        assert teachers() == before


class TestPlace:
    def test_what_has_a_place(self, tmp_path):
        plain = tiny_model("llama", depth=3)
        assert not has_place(plain)
        assert has_place(offloaded("disk", tmp_path))
        plain.is_quantized = True
        assert has_place(plain)

    @pytest.mark.parametrize("kind", ["disk_map", "from_pretrained"])
    def test_the_trainer_leaves_it_there(self, tmp_path, kind):
        """`to` refuses such models; losses equal the plain teacher's."""
        rows = [
            {key: value[0].tolist() for key, value in tiny_batch(seed=seed).items()}
            for seed in range(4)
        ]
        logs = []
        for teacher in (models()[1], offloaded(kind, tmp_path)):
            arguments = TrainingArguments(
                output_dir=str(tmp_path / "run"),
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                logging_steps=1,
                max_steps=2,
                per_device_train_batch_size=2,
                seed=3,
            )
            trainer = FDDTrainer(
                model=models()[0],
                args=arguments,
                teacher=teacher,
                fdd_config=FULL,
                train_dataset=rows,
                data_collator=lambda rows: {
                    key: torch.tensor([row[key] for row in rows]) for key in rows[0]
                },
            )
            trainer.train()
            logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert len(logs[0]) == 2
        assert logs[0] == pytest.approx(logs[1], rel=1e-6)
