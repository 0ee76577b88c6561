r"""What a distillation takes, told before it starts: memory by role, evaluations, time; what cannot fit is refused.

    plan = make_plan(
        {"teacher": (teacher, False), "student": (teacher, True), "critic": (teacher, True)},
        method.updates(steps), trainer, device="cuda", facts={"method": "dmd", "teacher": "sd15"},
    )
    print(*plan.lines(), sep="\n")
    plan.require_fit()

Weights, gradients, moments and averages are exact; activations are what `rehearsal` finds, which is exact for the tensors
that networks make, on the device that training runs on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..core.errors import UsageError
from ..models.denoiser import Condition
from ..training.config import TrainerConfig
from .adapters import AdapterConfig, AdapterDenoiser
from .estimate import Estimator, RoleMemory, total_bytes
from .machine import Speed, free_bytes, measure_speed
from .rehearsal import Cost, Update

LEFT_OUT = (
    "not counted: text encoders and VAE, workspaces of kernels, what the allocator and CUDA keep for themselves "
    "(about 1 GiB), pictures drawn on the way"
)


@dataclass(frozen=True)
class Plan:
    """Attributes:
    facts: what else is to be told, such as method, teacher, recipe and data, in this order.
    roles: memory of each.
    updates: of a training step, with the cost of one micro-batch; None where it could not be found.
    trainer: settings.
    samples: of one micro-batch of one process.
    device: on which this is.
    free: bytes that the device has for it; None if that is not known.
    seconds: that training takes, roughly; None if that is not known.
    suggestions: settings that fit, with their bytes; found only when they are asked for.
    """

    facts: Mapping[str, str]
    roles: Sequence[RoleMemory]
    updates: Sequence[tuple[Update, Cost | None]]
    trainer: TrainerConfig
    samples: int
    device: torch.device
    free: int | None
    seconds: float | None
    suggestions: Callable[[], list[tuple[str, int]]] = field(repr=False, default=list)

    @property
    def bytes(self) -> int:
        """At the peak of a training step."""
        return total_bytes(self.roles, [cost for _, cost in self.updates])

    @property
    def evaluations(self) -> int:
        """Of networks, for each sample of a training step; the pair of guidance counts twice."""
        return sum(update.evaluations for update, _ in self.updates)

    @property
    def fits(self) -> bool:
        """Whether the peak is within what is free, as far as both are known."""
        return self.free is None or self.bytes <= self.free

    def lines(self) -> list[str]:
        """The plan as text."""
        trainer = self.trainer
        parts = f" in {trainer.micro_batches} parts" if trainer.micro_batches > 1 else ""
        told = {
            **self.facts,
            "steps": f"{trainer.steps:,} of {trainer.batch_size} samples{parts}",
            "evaluations": f"{self.evaluations} of a network per sample and step, a guidance pair counted as two",
        }
        if self.seconds is not None:
            told["time"] = (
                f"about {_duration(self.seconds)}, roughly: from the speed of one matrix product on {self.device.type}"
            )
        free = "" if self.free is None else f" of {size(self.free)} free"
        told["memory"] = f"about {size(self.bytes)}{free} on {self.device.type}"
        width = max(map(len, told))
        return [f"{key:<{width}}  {value}" for key, value in told.items()] + self._table() + [f"  {LEFT_OUT}"]

    def require_fit(self) -> None:
        """Raises:
        UsageError: the device has less memory than this takes; says what would fit.
        """
        if self.fits:
            return
        found = self.suggestions()
        fitting = [f"{text} ({size(count)})" for text, count in found if count <= self.free]
        text, count = min(found, key=lambda item: item[1], default=("", self.bytes))
        advice = "A smaller teacher or a larger machine is needed."
        if fitting:
            advice = f"What fits: {'; '.join(fitting)}."
        elif count < self.bytes:
            advice = f"Even {text} needs {size(count)} or more. {advice}"
        raise UsageError(
            f"This run needs about {size(self.bytes)} on {self.device.type}, of which {size(self.free)} are free. {advice}"
        )

    def _table(self) -> list[str]:
        header = ("", "parameters", "weights", "moments", "average", "gradients", "activations")
        rows = [
            (r.name, f"{r.parameters:,}", *(size(n) if n else "" for n in (r.weights, r.moments, r.average)), "", "")
            for r in self.roles
        ]
        for update, cost in self.updates:
            samples = f"{self.samples} sample{'s' * (self.samples > 1)}"
            made = ("?", "?") if cost is None else (size(cost.gradients), size(cost.peak - cost.gradients))
            rows.append((f"{update.name} update, {samples}", "", "", "", "", *made))
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        return [
            "  " + "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in [header, *rows]
        ]  # fmt: skip


def make_plan(
    roles: Mapping[str, tuple[nn.Module, bool]],
    updates: Sequence[Update],
    trainer: TrainerConfig,
    *,
    adapters: AdapterConfig | None = None,
    average: str = "student",
    device: torch.device | str = "cpu",
    processes: int = 1,
    condition: Condition | None = None,
    facts: Mapping[str, str] | None = None,
    free: int | None = None,
    speed: Speed | None = None,
) -> Plan:
    """Estimate a run before anything of it is allocated.

    Args:
        roles: modules by name and whether they are trained, "teacher" among them. A role that starts as the teacher may be
            given as the teacher itself, and networks may be on the meta device.
        updates: of one training step.
        trainer: settings.
        adapters: trained denoisers are adapters of the teacher's network; roles that are `AdapterDenoiser` need no setting.
        average: role of which there is a moving average.
        device: where training is to run.
        processes: that share a batch.
        condition: of samples, (1, …) each; default: the teacher's empty condition.
        facts: further lines, such as method, teacher, recipe, data.
        free: bytes there are; default: what is free now, and what the given modules hold on that device already.
        speed: of the device; default: measured.
    """
    device = torch.device(device)
    estimator = Estimator(roles, updates, average, device, processes, condition)
    costs = estimator.costs(trainer, adapters)
    if free is None and (left := free_bytes(device)) is not None:
        free = left + _held([module for module, _ in roles.values()], device)
    seconds = None
    if all(costs):
        speed = speed or measure_speed(device, trainer.precision)
        step = sum(
            update.repeats * speed.seconds(cost.flops, cost.operators)
            for update, cost in zip(updates, costs, strict=True)
        )
        seconds = trainer.steps * trainer.micro_batches * step
    return Plan(
        facts=dict(facts or {}),
        roles=estimator.roles(trainer, adapters),
        updates=list(zip(updates, costs, strict=True)),
        trainer=trainer,
        samples=estimator.samples(trainer),
        device=device,
        free=free,
        seconds=seconds,
        suggestions=lambda: estimator.suggestions(trainer, adapters, free),
    )


def size(count: int) -> str:
    """Bytes for people: 3.2 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**10:.1f} KiB"


def _held(modules: Sequence[nn.Module], device: torch.device) -> int:
    """Bytes that modules have on a device already."""
    bases = [module.base.teacher for module in modules if isinstance(module, AdapterDenoiser)]
    tensors = (t for module in [*modules, *bases] for t in (*module.parameters(), *module.buffers()))
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type
    }
    return sum(storages.values())


def _duration(seconds: float) -> str:
    for unit, name in ((365 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
