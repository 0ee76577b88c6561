"""Recovery of a pruned pipeline inside the folder of a pruning run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.errors import UsageError
from ..models.data import load_images
from ..models.prompts import load_prompts, own_prompts
from ..models.saving import save_pipeline
from ..search.subjects import PipelineSubject, fine_plan
from ..training.recipes import RunConfig, method_settings
from ..training.rundir import RunDirectory
from ..training.trainer import Trainer, prepare
from .recovery import Recovery
from .settings import PruningConfig
from .states import piped, recoverable

_SHOWN, _SHOWN_OF_PROMPTS = 40, 10  # samples of the pictures
_MANY = 1000  # prompts whose states are kept


class PipelineRecovery:
    """Trains a pruned pipeline to do what the whole one does.

    Args:
        config: of the pruning run.
        recovery: resolved settings; completed with the defaults of the method.
        pipe: the pipeline, pruned or not yet.

    Raises:
        UsageError: a pipeline that cannot be recovered, wrong settings, real images for a model of prompts.
        DataError: see `models.data.load_images`.
    """

    def __init__(self, config: PruningConfig, recovery: RunConfig, pipe):
        self.config, self.trainer = config, recovery.trainer
        self.settings = method_settings(recovery, Recovery.Config)
        self.prompts = thinned(prompts_for(config), _MANY)
        teacher, _ = recoverable(pipe, self.prompts and self.prompts[:1])
        self.data = None
        if recovery.data:
            if self.prompts is not None:
                raise UsageError("Text-to-image models recover from what they draw themselves: leave --data out.")
            channels, *size = teacher.sample_shape
            self.data = load_images(recovery.data, channels, tuple(size), teacher.num_classes)
        self.accelerator = prepare(recovery.trainer)

    def fit(self, pruned, teacher, run: RunDirectory, resume: bool, progress: bool = True) -> None:
        """Train to the last step and export to final/.

        Args:
            pruned: the pruned pipeline, whose network is trained in place.
            teacher: the whole network.
            run: of the pruning run; checkpoints, pictures and metrics go there.
            resume: continue from its newest checkpoint if it has one.
            progress: show a bar on a terminal.

        Raises:
            NumericalError, InterruptedRun: see `training.trainer.Trainer.fit`.
        """
        batch_size, seed = self.config.batch_size, self.trainer.seed
        student, conditions = recoverable(pruned, self.prompts)
        whole, _ = recoverable(piped(pruned, teacher), self.prompts and self.prompts[:1])

        def show(network) -> torch.Tensor:
            subject = PipelineSubject(piped(pruned, network), self._shown(pruned), call_of(self.config), batch_size)
            plan = fine_plan(subject.schedule, self.config.steps)
            return subject.images(subject.file(plan), 0, _SHOWN_OF_PROMPTS if self.prompts else _SHOWN)

        def save(network, folder: Path) -> None:
            save_pipeline(piped(pruned, network), folder)

        method = Recovery(student, whole, conditions, self.data, self.settings, seed, show, save, batch_size)
        trainer = Trainer(method, self.trainer, run, self.accelerator, progress=progress)
        if resume:
            trainer.restore()
        trainer.fit()

    def _shown(self, pipe) -> list[dict]:
        if self.prompts:
            return [{"prompt": prompt} for prompt in self.prompts]
        return [{"class_labels": label} for label in range(pipe.num_classes)] if pipe.num_classes else [{}]


def prompts_for(config: PruningConfig) -> list[str] | None:
    """The prompts of a run: those that were given, else the model's own, else None."""
    return own_prompts(config.model) if config.prompts is None else load_prompts(config.prompts)


def call_of(config: PruningConfig) -> dict:
    """Arguments of the pipeline's call that do not change."""
    return {} if config.guidance_scale is None else {"guidance_scale": config.guidance_scale}


def thinned(items: Sequence | None, most: int) -> list | None:
    """At most so many, evenly from all."""
    return None if items is None else list(items)[:: -(-len(items) // most)]
