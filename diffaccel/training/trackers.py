"""Where scalars and sample pictures of a run are sent beside metrics.jsonl."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from ..core.config import read_yaml
from ..core.errors import UsageError
from ..core.files import write_atomic
from ..core.images import decode_image
from .extras import extra

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Tracker:
    """Sends nothing anywhere; base of those that do. Leaving its ``with`` block closes it."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers logged after ``step`` steps."""

    def picture(self, step: int, path: Path) -> None:
        """Take the PNG file of the samples drawn after ``step`` steps."""

    def flush(self) -> None:
        """Called before each checkpoint: what came before it is not logged again by a resumed run."""

    def close(self, failed: bool) -> None:
        """Called once at the end."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close(failed=kind is not None)


class TensorBoardTracker(Tracker):
    """Event files in the run's folder tensorboard/; what a killed run logged past its checkpoint is purged."""

    def __init__(self, folder: Path, step: int):
        writer = check_tracker("tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def scalars(self, step, values):
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def picture(self, step, path):
        self._writer.add_image("samples", decode_image(path.read_bytes()).pixels, step)

    def flush(self):
        self._writer.flush()

    def close(self, failed):
        self._writer.close()


class WandbTracker(Tracker):
    """A run of Weights & Biases in project "diffaccel", or WANDB_PROJECT; a resumed run continues it.

    The training step is a value of its own and the axis of all others, because a resumed run starts at its checkpoint
    and W&B drops what is behind its own count of steps.
    """

    def __init__(self, folder: Path, step: int):
        self._wandb = check_tracker("wandb")
        name = folder / "wandb.id"
        if not name.is_file():
            write_atomic(name, secrets.token_hex(8))
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "diffaccel"),
                name=folder.resolve().name,
                id=name.read_text(),
                dir=str(folder),
                config=read_yaml(folder / "config.yaml"),
                resume="allow",
                allow_val_change=True,
            )
        except self._wandb.Error as error:
            raise UsageError(
                f"W&B cannot start: {str(error).rstrip('.')}. Run `wandb login`, set WANDB_MODE=offline, or leave trainer.tracker out."
            ) from None
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step, values):
        self._run.log({"step": step, **values})

    def picture(self, step, path):
        self._run.log({"step": step, "samples": self._wandb.Image(str(path))})

    def close(self, failed):
        self._run.finish(exit_code=int(failed))


def check_tracker(name: str):
    """The module that a tracker needs; None for "none".

    Raises:
        UsageError: it cannot be imported; says what to install.
    """
    return extra(_MODULES[name], name, f"trainer.tracker={name}") if name in _MODULES else None


def open_tracker(name: str, folder: Path, step: int) -> Tracker:
    """The tracker of a run.

    Args:
        name: one of `config.TRACKERS`.
        folder: of the run.
        step: steps made so far; later ones of an earlier start are logged again.

    Raises:
        UsageError: its package is missing, or W&B refuses.
    """
    if name == "tensorboard":
        return TensorBoardTracker(folder, step)
    return WandbTracker(folder, step) if name == "wandb" else Tracker()
