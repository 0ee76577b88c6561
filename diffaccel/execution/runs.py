"""What is measured: whole runs of a pipeline, from prompt to image."""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from ..core.errors import UsageError

DEFAULT_STEPS = 20  # of pipelines that do not say how many they want
_GIVEN = {"prompt": "a photo of a cat", "class_labels": [0]}


def default_steps(pipe) -> int:
    """What the pipeline's folder says, or 20."""
    return pipe.config.get("num_inference_steps") or DEFAULT_STEPS


def standard_run(pipe, steps: int) -> Callable[[], torch.Tensor]:
    """A function that draws one image, always the same, with what the pipeline's call does by itself.

    Args:
        pipe: a pipeline that draws from a prompt, from a class, or from nothing.
        steps: sampling steps.

    Raises:
        UsageError: a pipeline that needs something else.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    own = {name: value for name, value in _GIVEN.items() if name in parameters}
    needed = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        and name not in own
    ]
    if needed or "num_inference_steps" not in parameters:
        what = needed[0] if needed else "other settings than steps"
        raise UsageError(
            f"{type(pipe).__name__} needs {what}: pass run=, such as lambda: pipe(…, num_inference_steps=10)."
        )
    if own.get("class_labels") and getattr(pipe, "num_classes", 1) is None:
        del own["class_labels"]
    own["num_inference_steps"] = steps

    def run() -> torch.Tensor:
        return pipe(**own, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)[0]

    return run


def images_of(result) -> list[torch.Tensor]:
    """All pictures in what a run returned, float32 on the CPU, in the range that the run gave them (8-bit ones in 0 … 1).

    Raises:
        UsageError: there are none.
    """
    found = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor) and leaf.dim() >= 3:
            found += list(leaf.detach().float().cpu()) if leaf.dim() > 3 else [leaf.detach().float().cpu()]
        elif isinstance(leaf, np.ndarray) and leaf.ndim >= 3:
            found += list(torch.from_numpy(leaf).float()) if leaf.ndim > 3 else [torch.from_numpy(leaf).float()]
        elif hasattr(leaf, "getbands"):  # Pillow's
            found.append(torch.from_numpy(np.array(leaf)).float() / 255)
    if not found:
        raise UsageError(f"run must return images, as lambda: pipe('a cat').images does; got {type(result).__name__}.")
    return found
