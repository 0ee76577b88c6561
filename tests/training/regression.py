"""A method with a known answer and its runs, for tests of the loop."""

from dataclasses import dataclass

import torch
from torch import nn

from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.method import Loss, Method, Phase
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer


class Regression(Method):
    """Two linear roles: ``model`` regresses noise onto a fixed map, ``helper`` follows the model."""

    main_role = "model"

    @dataclass
    class Config:
        """Attributes:
        poison_at: step whose "fit" update is spoilt.
        poison: what is not finite there: loss, metric (and the loss with it) or gradient.
        """

        poison_at: int = -1
        poison: str = "loss"

    def __init__(self, config: Config):
        self.config = config
        torch.manual_seed(0)
        self.roles = {"model": nn.Linear(3, 2), "helper": nn.Linear(3, 2)}
        self.target = torch.randn(2, 3)
        self.updates = 0
        self.called = []

    def phases(self, step):
        return [Phase("follow", ("helper",), repeats=2), Phase("fit", ("model",))]

    def loss(self, phase, draw):
        x = draw.normal("x", (3,))
        model, helper = self.roles["model"](x), self.roles["helper"](x)
        if phase.name == "follow":
            return Loss((helper - model).square().mean())
        total = (model - x @ self.target.T).square().mean()
        metrics = {"size": model.detach().abs().mean()}
        if draw.step == self.config.poison_at:
            total = self._poisoned(total, metrics)
        return Loss(total, metrics)

    def _poisoned(self, total, metrics):
        if self.config.poison == "gradient":  # that of a root at 0
            return total + (0 * self.roles["model"].bias).square().sum().sqrt()
        if self.config.poison == "metric":
            metrics["ratio"] = torch.tensor(float("inf"))
        return total * float("nan")

    def samples(self, model, random):
        self.called.append("samples")

    def export(self, model, folder):
        torch.nn.utils.parameters_to_vector(model.parameters()).numpy().tofile(folder / "weights.bin")

    def end_phase(self, phase, total):
        self.updates += 1

    def begin(self, folder):
        self.called.append(folder)

    def end_step(self, step):
        self.called.append((step, self.updates))

    def extra_state(self):
        return {"updates": torch.tensor(self.updates)}

    def load_extra_state(self, state):
        self.updates = int(state["updates"])


def settings(**changes) -> TrainerConfig:
    optimizer = OptimizerConfig(lr=0.05, warmup=3, final_lr_fraction=0.1)
    defaults = {"steps": 12, "batch_size": 8, "checkpoint_every": 4, "log_every": 2, "device": "cpu"}
    return TrainerConfig(**{**defaults, "optimizers": {"model": optimizer, "helper": optimizer}, **changes})


def trained(folder, stop_after=None, resume=False, config=None, method=None) -> Trainer:
    with RunDirectory(folder, {"kind": "regression"}, resume) as run:
        trainer = Trainer(method or Regression(Regression.Config()), config or settings(), run, progress=False)
        if resume:
            trainer.restore()
        if stop_after is None:
            trainer.fit()
        else:
            while trainer.step < stop_after:
                trainer._train_step()
                trainer.step += 1
            trainer.save()
    return trainer


def vector(trainer: Trainer) -> torch.Tensor:
    modules = [*trainer.method.roles.values(), trainer.model]
    return torch.cat([nn.utils.parameters_to_vector(module.parameters()) for module in modules])
