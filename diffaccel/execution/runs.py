"""What is measured: whole runs of a pipeline, from prompt to image."""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from ..core.errors import UsageError

DEFAULT_STEPS = 20  # of pipelines that do not say how many they want
_IMAGES = ("image", "mask_image", "control_image")  # what editing pipelines start from, None by default in some
_OWN = "in Python, pass run=, such as lambda: pipe(…, num_inference_steps=10).images."
_GIVEN = {"prompt": "a photo of a cat", "class_labels": [0]}


def default_steps(pipe) -> int:
    """What the pipeline's folder says, else what its call takes by itself, else 20."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    own = parameter.default if parameter is not None and isinstance(parameter.default, int) else None
    return pipe.config.get("num_inference_steps") or own or DEFAULT_STEPS


def standard_run(pipe, steps: int) -> Callable[[], torch.Tensor]:
    """A function that draws one image, always the same, with what the pipeline's call does by itself.

    Args:
        pipe: a pipeline that draws from a prompt, from a class, or from nothing.
        steps: sampling steps.

    Raises:
        UsageError: a pipeline that needs something else, at once or when it is called.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    own = {name: value for name, value in _GIVEN.items() if name in parameters}
    given = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        and name not in own
    ]
    needed = given or [name for name in _IMAGES if name in parameters]
    if needed or "num_inference_steps" not in parameters:
        what = needed[0] if needed else "other settings than steps"
        raise UsageError(f"{type(pipe).__name__} needs {what}: {_OWN}")
    if own.get("class_labels") and getattr(pipe, "num_classes", 1) is None:
        del own["class_labels"]
    own["num_inference_steps"] = steps

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        try:
            return pipe(**own, generator=generator, output_type="pt", return_dict=False)[0]
        except (TypeError, ValueError) as error:
            raise UsageError(f"{type(pipe).__name__} cannot draw from a prompt alone ({error}): {_OWN}") from error

    return run


def images_of(result) -> list[torch.Tensor]:
    """All pictures in what a run returned, float32 on the CPU, in the range that the run gave them (8-bit ones in 0 … 1).

    Raises:
        UsageError: there are none.
    """
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(result):
        if hasattr(leaf, "getbands"):  # Pillow's
            leaf = np.array(leaf)
        tensor = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
            scale = 255 if tensor.dtype == torch.uint8 else 1
            pictures = tensor.detach().float().cpu() / scale
            found += list(pictures) if pictures.dim() > 3 else [pictures]
    if not found:
        raise UsageError(f"run must return images, as lambda: pipe('a cat').images does; got {type(result).__name__}.")
    return found


def difference_of(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Mean absolute difference of two lists of images in [0, 1], in levels of 8 bits.

    Raises:
        UsageError: not as many images, or of other sizes.
    """
    if [image.shape for image in left] != [image.shape for image in right]:
        raise UsageError("run must draw as many images, of the same sizes, at every call.")
    pairs = list(zip(left, right, strict=True))
    return 255 * sum(float((a.double() - b.double()).abs().mean()) for a, b in pairs) / len(pairs)
