"""The projection of feature space in FDDTrainer and FDDLightningModule: trained, saved, resumed."""

import pytest
import torch
from safetensors.torch import load_file

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.integrations.trained_projection import PROJECTION_FILE
from tests.support.hf_models import tiny_model
from tests.support.training import examples, lightning_options, pad, same_parameters, trainer

CONFIG = FDDConfig.paper(
    num_layers=2, ce_weight=0.5, space="feature", trajectory="mse", projection="linear"
)
ROWS = examples([4, 17, 6, 12])
# Plain gradient descent: the parameters show the gradient, not only its direction.
DESCENT = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}
# float32 sums over tokens in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def trained(run) -> torch.nn.ModuleList:
    return torch.nn.ModuleList([run.model, run.distiller.projection])


def descended(steps: int, projection: torch.Tensor) -> torch.nn.ModuleList:
    """Train by hand on all rows at once, from the given projection."""
    student = tiny_model("llama", depth=3, seed=1).train()
    distiller = Distiller(student, tiny_model("gpt2", depth=3, seed=2), CONFIG)
    distiller.projection.weight.data = projection.clone()
    modules = torch.nn.ModuleList([student, distiller.projection])
    plain = [p for n, p in modules.named_parameters() if "norm" in n]
    decayed = [p for n, p in modules.named_parameters() if "norm" not in n]
    groups = [{"params": plain}, {"params": decayed, "weight_decay": DESCENT["weight_decay"]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for _ in range(steps):
        distiller(pad(ROWS)).loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), DESCENT["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    return modules


def test_accumulated_steps_are_those_of_one_large_batch(tmp_path):
    """Also the norm that clips, and weight decay; the second step begins with gradients of 0."""
    run = trainer(
        tmp_path,
        train=ROWS,
        config=CONFIG,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=2,
        **DESCENT,
    )
    start = run.distiller.projection.weight.detach().clone()
    run.train()
    assert (run.distiller.projection.weight - start).abs().max() > 1e-3
    same_parameters(trained(run), descended(2, start), **CLOSE)
    run.save_model(str(tmp_path / "student"))
    saved = load_file(tmp_path / "student" / PROJECTION_FILE)["weight"]
    assert torch.equal(saved, run.distiller.projection.weight)


def test_resumed_equals_uninterrupted(tmp_path):
    options = {"train": ROWS, "config": CONFIG, "max_steps": 4, "save_strategy": "steps"}
    whole = trainer(tmp_path, save_steps=2, **options)
    whole.train()
    resumed = trainer(tmp_path, student=tiny_model("llama", depth=3, seed=77), **options)
    with torch.no_grad():
        resumed.distiller.projection.weight.mul_(3.0)
    folder = tmp_path / "checkpoint-2"
    resumed.train(resume_from_checkpoint=str(folder))
    same_parameters(trained(resumed), trained(whole), rtol=0, atol=0)
    (folder / PROJECTION_FILE).unlink()
    with pytest.raises(ValueError, match=r"lacks fdd_projection.safetensors \(which a training in"):
        resumed.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("flag", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")]
)
def test_plugins_that_own_the_parameters_are_refused(tmp_path, flag, name):
    run = trainer(tmp_path, train=ROWS, config=CONFIG)
    setattr(run, flag, True)
    with pytest.raises(ValueError, match=f"{name} holds the student's parameters alone"):
        run._require_whole_projection()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Lightning, about workers and loggers
def test_lightning(tmp_path):
    """A step is that of one large batch, and a training resumes bit for bit."""
    pl = pytest.importorskip("lightning.pytorch")
    from fdd_kernels.integrations import FDDLightningModule

    def fit(epochs, seed=0, resume=None):
        student, teacher = tiny_model("llama", depth=3, seed=1), tiny_model("gpt2", depth=3, seed=2)
        torch.manual_seed(seed)
        module = FDDLightningModule(
            student, teacher, CONFIG, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        )
        start = module.projection.weight.detach().clone()
        data = torch.utils.data.DataLoader([pad([row]) for row in ROWS], batch_size=None)
        options = lightning_options(tmp_path) | {"accumulate_grad_batches": 4}
        run = pl.Trainer(max_epochs=epochs, num_sanity_val_steps=0, **options)
        run.fit(module, data, **({} if resume is None else {"ckpt_path": resume}))
        return module, start, run

    once, start, run = fit(1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    distiller = Distiller(tiny_model("llama", depth=3, seed=1).train(), *once._teacher, CONFIG)
    distiller.projection.weight.data = start
    distiller(pad(ROWS)).loss.backward()
    expected = start - 0.1 * distiller.projection.weight.grad
    torch.testing.assert_close(once.projection.weight.detach(), expected, **CLOSE)
    assert set(once.state_dict()) > {"projection.weight"}
    whole, resumed = fit(2)[0], fit(2, seed=5, resume=tmp_path / "half.ckpt")[0]
    same_parameters(resumed, whole, rtol=0, atol=0)
