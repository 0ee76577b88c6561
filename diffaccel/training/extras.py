"""Packages that only some settings need."""

import importlib
from types import ModuleType

from ..core.errors import UsageError


def extra(module: str, package: str, setting: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: what is imported.
        package: what pip calls it.
        setting: the setting that asks for it.

    Raises:
        UsageError: it is missing or cannot be imported here.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # compiled packages raise all kinds of errors where their libraries are missing
        raise UsageError(
            f"{setting} needs {package}, which cannot be imported here ({error}): pip install {package}, "
            "or leave the setting out."
        ) from None
