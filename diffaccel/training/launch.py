"""One run from settings to final/."""

from collections.abc import Callable
from pathlib import Path

from ..core.config import read_yaml
from ..core.errors import DiffaccelError, UsageError
from .method import Method
from .recipes import RunConfig, complete
from .rundir import RunDirectory, changed_settings, check_output
from .trainer import Trainer, prepare


def stored_settings(output: Path | None, method: str | None = None) -> dict:
    """Settings of the run to be resumed.

    Args:
        output: the run's folder.
        method: the method that is asked for; None for whatever the run was started with.

    Raises:
        UsageError: no output folder was named, it holds no run, or one of another method.
    """
    if output is None:
        raise UsageError("--resume needs the run's folder: --output RUN --resume.")
    check_output(output, resume=True)
    settings = read_yaml(output / "config.yaml")
    group = settings.get("method")
    started = group.get("name") if isinstance(group, dict) else None
    if method not in (None, started):
        raise changed_settings(output, [f"method.name: {started!r} -> {method!r}"])
    return settings


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
    accelerator = prepare(config.trainer)
    settings = complete(config, list(method.roles))
    try:
        with RunDirectory(output, settings, resume, writes=accelerator.is_main_process) as run:
            trainer = Trainer(method, config.trainer, run, accelerator, evaluator, progress)
            if resume:
                trainer.restore()
            trainer.fit()
    except DiffaccelError as error:
        vars(error).setdefault("told_elsewhere", not accelerator.is_main_process)  # what all find, the first says
        raise
    return output / "final"
