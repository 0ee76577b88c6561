"""A tiny distillation task and short trainings of it, shared by tests."""

import torch
from networks import tiny_unet
from torch import nn

from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import VPDiscrete
from diffaccel.distill.task import Task
from diffaccel.models.conditions import ClassConditions, NoConditions
from diffaccel.models.data import load_images
from diffaccel.models.pixel import PixelDenoiser
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.method import Draw
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer

CPU = torch.device("cpu")


def tiny_teacher(embeddings: int | None = 11) -> PixelDenoiser:
    """8×8 pixels, ten classes and a null class, random weights, the same at every call."""
    schedule = VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
    return PixelDenoiser(tiny_unet(embeddings), schedule, "v_prediction")


def tiny_task(data: bool = False, embeddings: int | None = 11) -> Task:
    """The tiny teacher, and real digits if wanted."""
    conditions = ClassConditions(embeddings - 1) if embeddings else NoConditions()
    return Task(tiny_teacher(embeddings), conditions, load_images("digits", 1, (8, 8), 10) if data else None)


def trained(method, folder, steps=5, batch_size=8, **changes):
    """The method after training steps in a new run folder, or in the folder of a run that goes on."""
    rates = {name: OptimizerConfig(lr=1e-3, betas=(0.0, 0.99)) for name in method.roles}
    config = TrainerConfig(steps=steps, batch_size=batch_size, optimizers=rates, device="cpu", **changes)
    resume = (folder / "config.yaml").is_file()
    with RunDirectory(folder, {}, resume) as run:
        trainer = Trainer(method, config, run, progress=False)
        if resume:
            trainer.restore()
        method.begin(folder)
        while trainer.step < steps:
            trainer._train_step()
            trainer.step += 1
        trainer.save()
    return method


def weights(method, role="student") -> torch.Tensor:
    """All parameters of a role."""
    return nn.utils.parameters_to_vector(method.roles[role].parameters()).detach()


def draw(count=6, step=0, stream="student/0") -> Draw:
    """The random numbers of one whole batch."""
    return Draw(KeyedRandom(0), stream, step, 0, count, count, CPU)
