"""Versions of everything that can change a number."""

import platform
from importlib import metadata

_PACKAGES = ("diffaccel", "torch", "diffusers", "numpy", "pillow")


def library_versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of the named packages."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
