"""Methods that train models from scratch, by the names that recipes use."""

import importlib

from ..core.errors import unknown

METHODS = {
    "digits-denoising": "diffaccel.training.denoising:DigitsDenoising",
    "digits-classifier": "diffaccel.training.classification:DigitsClassification",
}


def load_method(name: str) -> type:
    """Import a method class.

    Raises:
        UsageError: unknown name.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    module, attribute = METHODS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
