"""`diffaccel env`: what to paste into an issue."""

import json
import os
import platform
from typing import Annotated

import typer

from ..core.versions import library_versions

_PACKAGES = (
    "diffaccel",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "torchmetrics",
    "xformers",
    "numpy",
    "pillow",
)


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False):
    """Print versions and devices, for bug reports."""
    import torch

    from ..attention.backends import BACKENDS
    from ..core.processes import usable_device
    from ..models.teachers import TEACHERS

    device = usable_device("auto")
    refused = {backend.name: backend.unusable(device) for backend in BACKENDS.values()}
    facts = {
        "platform": platform.platform(),
        **library_versions(_PACKAGES),
        "cpu cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "not available",
        "attention": ", ".join(name for name, reason in refused.items() if reason is None),
        "attention, not here": " ".join(f"{name}: {reason}" for name, reason in refused.items() if reason),
        "embedded teachers": ", ".join(info.name for info in TEACHERS.values() if not info.repository),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            typer.echo(f"{key:<{width}}  {value}")
