"""One run from settings to final/."""

from collections.abc import Callable
from pathlib import Path

from ..core.config import read_yaml
from ..core.errors import UsageError
from .method import Method
from .recipes import RunConfig, complete
from .rundir import RunDirectory, check_output
from .trainer import Trainer


def stored_settings(output: Path | None) -> dict:
    """Settings of the run to be resumed.

    Raises:
        UsageError: no output folder was named, or it holds no run.
    """
    if output is None:
        raise UsageError("--resume needs the run's folder: --output RUN --resume.")
    check_output(output, resume=True)
    return read_yaml(output / "config.yaml")


def launch(
    method: Method,
    config: RunConfig,
    output: Path,
    resume: bool = False,
    evaluator: Callable | None = None,
    progress: bool = True,
) -> Path:
    """Train ``method`` in the run folder ``output`` and return its final/ folder.

    Args:
        evaluator: see `Trainer`.
        resume: continue from the newest intact checkpoint.

    Raises:
        UsageError, DataError, NumericalError, InterruptedRun: see `RunDirectory` and `Trainer`.
    """
    with RunDirectory(output, complete(config, list(method.roles)), resume) as run:
        trainer = Trainer(method, config.trainer, run, evaluator, progress)
        if resume:
            trainer.restore()
        trainer.fit()
    return output / "final"
