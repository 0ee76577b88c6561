"""Classes named by strings, so that registries cost no imports."""

import importlib


def load_object(target: str):
    """Import what "module:name" names."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
