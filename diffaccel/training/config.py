"""Settings of the training loop; every field is a key of a recipe's ``trainer`` group and of `--set trainer.…`."""

import math
from dataclasses import dataclass, field

from ..core.errors import UsageError, unknown

TRACKERS = ("none", "tensorboard", "wandb")


@dataclass
class OptimizerConfig:
    """AdamW for one role. The learning rate is a pure function of the training step, so resuming needs no scheduler.

    Attributes:
        lr: peak learning rate.
        betas: AdamW moment decays; beta1 = 0 is usual where a critic moves the target.
        weight_decay: decoupled weight decay.
        warmup: training steps of linear warm-up.
        final_lr_fraction: the cosine ends at this fraction of ``lr``; 1 keeps it constant.
        clip: largest gradient norm of the role.
    """

    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 0
    final_lr_fraction: float = 1.0
    clip: float = 1.0

    def __post_init__(self):
        for name in ("lr", "weight_decay", "warmup", "final_lr_fraction"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"Optimiser setting {name} must not be negative, got {getattr(self, name)}.")
        if not self.clip > 0:
            raise UsageError(f"Optimiser setting clip must be positive, got {self.clip}.")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UsageError(f"Optimiser setting betas must be two numbers in [0, 1), got {list(self.betas)}.")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of training step ``step`` (0-based) of ``steps``."""
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        return self.lr * ramp * (self.final_lr_fraction + (1.0 - self.final_lr_fraction) * cosine)


@dataclass
class TrainerConfig:
    """Settings of the loop.

    Attributes:
        steps: training steps (updates of the main role).
        batch_size: samples per update over all processes and micro-batches.
        micro_batches: gradient accumulation: parts that each process splits its share of a batch into; less memory for
            the same result.
        seed: of everything random.
        ema: decay of the moving average of the main role.
        optimizers: settings by role name.
        eight_bit: optimiser moments in 8 bits (bitsandbytes): 2 instead of 8 bytes a trained parameter, and another
            result.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: about a third more
            time, the same result.
        log_every, sample_every, checkpoint_every: intervals in training steps; 0 for sample/checkpoint means only at the
            end.
        keep: number of checkpoints kept.
        tracker: where scalars and pictures go beside metrics.jsonl and samples/: "none", "tensorboard" (event files in the
            run's folder tensorboard/) or "wandb" (project diffaccel, or WANDB_PROJECT).
        device: "auto" (CUDA where there is one, else the CPU), "cpu" or "cuda".
        precision: "no" (float32) or "bf16" (networks compute in bfloat16 where autocast lets them; weights, gradients and
            moments stay float32).
        threads: CPU threads; 0 leaves torch's default. More than one only pays where nothing else runs.
    """

    steps: int = 1000
    batch_size: int = 64
    micro_batches: int = 1
    seed: int = 0
    ema: float = 0.99
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)
    eight_bit: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 10
    sample_every: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    tracker: str = "none"
    device: str = "auto"
    precision: str = "no"
    threads: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "micro_batches", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"trainer.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("sample_every", "checkpoint_every", "threads", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"trainer.{name} must not be negative, got {getattr(self, name)}.")
        if not 0.0 <= self.ema < 1.0:
            raise UsageError(f"trainer.ema must be in [0, 1), got {self.ema}.")
        choices = {"precision": ("no", "bf16"), "device": ("auto", "cpu", "cuda"), "tracker": TRACKERS}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise unknown(f"trainer.{name}", getattr(self, name), valid)
