"""The one training loop: phases, accumulation, clipping, moving average, checkpoints, resume, pictures, metrics."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ..core.errors import InterruptedRun, NumericalError, UsageError
from ..core.files import atomic_directory
from ..core.images import save_grid, to_uint8
from ..core.processes import Processes
from ..core.rng import KeyedRandom
from .checkpoint import check_tensors, load_module, load_newest, read_tensors, save_checkpoint
from .config import OptimizerConfig, TrainerConfig
from .ema import EMA
from .gradients import average, faulty_gradient, faulty_loss
from .method import Draw, Loss, Method, Phase
from .optimizers import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_class,
    optimizer_tensors,
    trained_parameters,
)
from .rundir import RunDirectory
from .signals import SignalGuard
from .trackers import Tracker, check_tracker, open_tracker


def prepare(config: TrainerConfig):
    """The accelerate.Accelerator of a run: device, precision, processes.

    Raises:
        UsageError: a device that is not there, a batch that the processes and micro-batches do not divide, another
            precision than an earlier run of this process had, or settings that need a package that is missing.
    """
    from accelerate import Accelerator

    check_tracker(config.tracker)
    optimizer_class(config.eight_bit)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("trainer.device is cuda, but torch finds no CUDA device; use auto or cpu.")
    cpu = config.device == "cpu" or not torch.cuda.is_available()  # not MPS: it has no float64, which schedules need
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=config.precision)
    except ValueError as error:  # accelerate keeps one state per process
        raise UsageError(f"trainer.precision {config.precision!r} cannot be used here: {error}") from None
    parts = accelerator.num_processes * config.micro_batches
    if config.batch_size % parts:
        raise UsageError(
            f"trainer.batch_size {config.batch_size} is not a multiple of processes × micro_batches = {parts}."
        )
    return accelerator


class Trainer:
    """Trains the roles of a method inside a run directory.

    A run that was killed at any moment and resumed ends with bit-identical weights (on CUDA: up to its own
    non-deterministic kernels): all randomness is keyed by step and sample index, learning rates are functions of the
    step, and checkpoints appear by one rename.

    Args:
        method: roles, phases and losses.
        config: settings of the loop.
        run: where everything is written.
        accelerator: from `prepare`, which is called if it is not given.
        evaluator: called with the moving average whenever a picture is drawn; its scalars are logged.
        progress: show a progress bar when stderr is a terminal.
    """

    def __init__(
        self,
        method: Method,
        config: TrainerConfig,
        run: RunDirectory,
        accelerator=None,
        evaluator: Callable[[nn.Module], dict[str, float]] | None = None,
        progress: bool = True,
    ):
        self.accelerator = accelerator or prepare(config)
        self.method, self.config, self.run, self.progress = method, config, run, progress
        self.evaluator = evaluator
        self.random = KeyedRandom(config.seed)
        device = self.accelerator.device
        self.processes = Processes(str(device))
        method.to(device)
        self.trained: dict[str, list[nn.Parameter]] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, module in method.roles.items():
            module.to(device).train()
            self.trained[name] = trained_parameters(module)
            self.optimizers[name] = make_optimizer(self.trained[name], self._settings(name), config.eight_bit)
        self.ema = EMA(method.roles[method.main_role], config.ema)
        if config.gradient_checkpointing:
            method.enable_gradient_checkpointing()
        self.step = 0
        self.tracker = Tracker()  # opened by `fit`
        self._sums: dict[str, list[float | torch.Tensor]] = defaultdict(list)

    @property
    def model(self) -> nn.Module:
        """The moving average of the main role: what is sampled and exported."""
        return self.ema.module

    def restore(self) -> None:
        """Continue from the newest checkpoint of the run that is intact and fits, if there is one.

        Raises:
            DataError: there are checkpoints, but none that can be used.
        """
        main = self.accelerator.is_main_process
        self.step = load_newest(self.run.checkpoints, self._load, lambda text: main and print(text, file=sys.stderr))
        if main:
            self.run.rewind(self.step)
        self.accelerator.wait_for_everyone()

    def _load(self, path: Path) -> None:
        for name, module in self.method.roles.items():
            load_module(module, read_tensors(path, name), f"{path.name}/{name}")
            state = f"{name}.optimizer"
            load_optimizer_tensors(self.optimizers[name], read_tensors(path, state), f"{path.name}/{state}")
        load_module(self.model, read_tensors(path, "ema"), f"{path.name}/ema")
        state = read_tensors(path, "method")
        check_tensors(self.method.extra_state(), state, f"{path.name}/method")
        self.method.load_extra_state(state)

    def fit(self) -> None:
        """Train to the last step, then export the moving average to final/.

        Raises:
            NumericalError: a loss or gradient is not finite; raised before any weight is touched by it.
            InterruptedRun: Ctrl-C or SIGTERM; the state was saved.
        """
        config = self.config
        self.method.begin(self.run.path)
        self.accelerator.wait_for_everyone()
        main = self.accelerator.is_main_process
        self.tracker = open_tracker(config.tracker if main else "none", self.run.path, self.step)
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=None if self.progress else True)
        started = time.monotonic()
        with self.tracker, SignalGuard() as guard, bar:
            if self.step == 0:
                self._picture()
            while self.step < config.steps:
                self._train_step()
                self.step += 1
                bar.update()
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    self._log(bar, time.monotonic() - started)
                if last or (config.sample_every and self.step % config.sample_every == 0):
                    self._picture()
                stop = self._agreed(guard.received)
                if last or stop or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self.save()
                if stop and not last:
                    raise InterruptedRun(
                        f"Stopped and saved at step {self.step} of {config.steps}; continue with --resume.", stop
                    )
            self._export()

    def save(self) -> None:
        """Write a checkpoint of the present state."""
        if not self.accelerator.is_main_process:
            return
        self.tracker.flush()
        tensors = {"ema": self.model.state_dict(), "method": self.method.extra_state()}
        for name, module in self.method.roles.items():
            tensors[name] = module.state_dict()
            tensors[f"{name}.optimizer"] = optimizer_tensors(self.optimizers[name])
        save_checkpoint(self.run.checkpoints, self.step, tensors, {"roles": list(self.method.roles)}, self.config.keep)

    def _agreed(self, signal_number: int | None) -> int | None:
        """The signal that any process has received: all of them stop after the same step."""
        if self.accelerator.num_processes == 1:
            return signal_number
        flag = torch.tensor(signal_number or 0, device=self.accelerator.device)
        return int(self.accelerator.gather(flag[None]).max()) or None

    def _settings(self, role: str) -> OptimizerConfig:
        return self.config.optimizers.get(role, OptimizerConfig())

    def _train_step(self) -> None:
        for phase in self.method.phases(self.step):
            for repeat in range(phase.repeats):
                self._update(phase, repeat)
                self.method.end_phase(phase, self.accelerator.reduce)
        self.ema.update(self.method.roles[self.method.main_role], self.step)
        self.method.end_step(self.step)
        self.accelerator.wait_for_everyone()

    def _update(self, phase: Phase, repeat: int) -> None:
        for name, parameters in self.trained.items():
            for parameter in parameters:
                parameter.requires_grad_(name in phase.trains)
        losses = []
        for draw in self._draws(phase, repeat):
            with self.accelerator.autocast():
                loss = self.method.loss(phase, draw)
            self.accelerator.backward(loss.total / self.config.micro_batches)
            losses.append(loss.detached())
            for key, metric in losses[-1].metrics.items():
                self._sums[f"{phase.name}/{key}"].append(metric)
        norms = [self._gradient_norm(role) for role in phase.trains]
        values = self._finite(phase, losses, norms)
        self._sums[f"{phase.name}/loss"] += values[: len(losses)]
        for role, norm, value in zip(phase.trains, norms, values[len(losses) :], strict=True):
            self._sums[f"{phase.name}/grad_norm_{role}"].append(value)
            nn.utils.clip_grads_with_norm_(self.trained[role], self._settings(role).clip, norm)
            self._apply(role)

    def _gradient_norm(self, role: str) -> torch.Tensor:
        """Average the gradients of a role over processes; return their norm."""
        parameters = [parameter for parameter in self.trained[role] if parameter.grad is not None]
        average(parameters, self.accelerator)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        return norm.float().to(self.accelerator.device)

    def _finite(self, phase: Phase, losses: list[Loss], norms: list[torch.Tensor]) -> list[float]:
        """Values of the losses and norms in one transfer, before any optimiser moves.

        Raises:
            NumericalError: on all processes, if a value is not finite on any.
        """
        accelerator = self.accelerator
        totals = [loss.total for loss in losses]
        shared = [accelerator.reduce(torch.stack(totals).mean(), "mean")] if accelerator.num_processes > 1 else []
        values = torch.stack([*totals, *norms, *shared]).tolist()
        if all(math.isfinite(value) for value in values):
            return values[: len(totals) + len(norms)]
        loss = faulty_loss(phase.name, losses)
        gradient = faulty_gradient({role: self.method.roles[role] for role in phase.trains})
        error = NumericalError(
            f"The {loss or gradient or 'norm of a gradient overflows'} in the {phase.name} update of step {self.step}; "
            f"no weight was changed by it. Checkpoints up to here are kept in {self.run.checkpoints}; a new run with a "
            "lower learning rate usually helps."
        )
        # The loss of one process makes the averaged gradients of all not finite: the process that knows most says it.
        known = torch.tensor([2 if loss else 1 if gradient else 0], device=accelerator.device)
        everywhere = accelerator.gather(known).tolist()
        error.told_elsewhere = everywhere.index(max(everywhere)) != accelerator.process_index
        raise error

    def _apply(self, role: str) -> None:
        optimizer = self.optimizers[role]
        for group in optimizer.param_groups:
            group["lr"] = self._settings(role).lr_at(self.step, self.config.steps)
        optimizer.step()
        optimizer.zero_grad()

    def _draws(self, phase: Phase, repeat: int):
        """The micro-batches of this process, as keyed random numbers."""
        config, accelerator = self.config, self.accelerator
        parts = accelerator.num_processes * config.micro_batches
        count = config.batch_size // parts
        first = accelerator.process_index * config.micro_batches
        for part in range(first, first + config.micro_batches):
            yield Draw(
                random=self.random,
                stream=f"{phase.name}/{repeat}",
                step=self.step,
                start=part * count,
                count=count,
                batch_size=config.batch_size,
                device=accelerator.device,
            )

    def _log(self, bar: tqdm, seconds: float) -> None:
        sums = {key: (float(sum(values)), len(values)) for key, values in self._sums.items()}
        self._sums.clear()
        everywhere = self.processes.gather_json(sums)
        means = {}
        for key in dict.fromkeys(
            key for found in everywhere for key in found
        ):  # not every process has met every metric
            totals, counts = zip(*(found[key] for found in everywhere if key in found), strict=True)
            means[key] = sum(totals) / sum(counts)
        self._record({**means, "seconds": round(seconds, 2)})
        bar.set_postfix({key: f"{value:.3g}" for key, value in means.items() if key.endswith("/loss")})

    def _record(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.run.log({"step": self.step, **values})
            self.tracker.scalars(self.step, values)

    @torch.no_grad()
    def _picture(self) -> None:
        if not self.accelerator.is_main_process:
            return
        images = self.method.samples(self.model, self.random)
        if images is not None:
            save_grid(to_uint8(images), self.run.picture(self.step))
            self.tracker.picture(self.step, self.run.picture(self.step))
        values = self.method.validate(self.model) | (self.evaluator(self.model) if self.evaluator else {})
        if values:
            self._record({f"validation/{key}": value for key, value in values.items()})

    def _export(self) -> None:
        final = self.run.path / "final"
        if self.accelerator.is_main_process and not final.exists():
            with atomic_directory(final) as temporary:
                self.method.export(self.model, temporary)
        self.accelerator.wait_for_everyone()
