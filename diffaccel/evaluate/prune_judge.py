"""The Fréchet distance by which a pruned model is compared with the whole one."""

import math

import torch

from ..core.errors import DataError, NumericalError
from ..generation import generate
from ..models.conditioning import conditioning_of
from ..models.teachers import TEACHERS
from ..prune.pipelines import prompts_for
from ..prune.settings import PruningConfig
from .monitor import Monitor


class Judge:
    """Distance of what a pipeline draws, from the same noise each time.

    Args:
        config: of the run; its reference, else the real images of the named teacher, else what the whole model draws from
            other noise.
        pipe: the whole model.
        prompts: of a text-to-image model, in turn; None for others.

    Attributes:
        name: of the distance.

    Raises:
        DataError, MissingWeightsError, UsageError: see `monitor.Monitor`; a reference of features that do not read this
            pipeline's images.
    """

    def __init__(self, config: PruningConfig, pipe, prompts: list[str] | None):
        self.config, self.prompts = config, prompts
        info = TEACHERS.get(config.model)
        reference = config.reference or (info.data if info else "")
        monitor = Monitor(reference or self._images(pipe, config.seed + 1))
        shape = conditioning_of(pipe, prompts=prompts).image_shape
        monitor.extractor(torch.zeros(1, *shape, dtype=torch.uint8))  # an error here comes before hours of scores
        self._monitor, self.name = monitor, monitor.name + ("" if reference else " to the whole model")

    def __call__(self, pipe) -> float:
        """Of ``config.num`` images; infinite where they are not finite."""
        try:
            return self._monitor.distance(self._images(pipe, self.config.seed))
        except NumericalError:
            return math.inf

    def _images(self, pipe, seed: int) -> torch.Tensor:
        config = self.config
        more = {"guidance_scale": config.guidance_scale, "batch_size": config.batch_size, "prompts": self.prompts}
        return torch.cat([images for images, _ in generate(pipe, config.num, seed=seed, **more)])


def judge_for(config: PruningConfig, pipe) -> Judge | None:
    """None where no distance is wanted, or the pipeline is of a kind that `generate` cannot call.

    Raises:
        DataError: it is, and there is a reference; see `Judge`.
    """
    if not config.num:
        return None
    prompts = prompts_for(config)
    try:
        conditioning_of(pipe, prompts=prompts)
    except DataError:
        if config.reference:
            raise
        return None
    return Judge(config, pipe, prompts)
