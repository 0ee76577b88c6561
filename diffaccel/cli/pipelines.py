"""Options of the verbs that measure a pipeline, and how they open it."""

import re
from typing import Annotated

import typer

from ..core.errors import UsageError

Model = Annotated[
    str, typer.Option("--model", "-m", help="Teacher name, or a folder in diffusers layout.", show_default=False)
]
Approximate = Annotated[bool, typer.Option("--approximate", help="Attention with reduced precision may be used too.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16; default: as it is loaded.", show_default=False)
]
Device = Annotated[str | None, typer.Option(help="Torch device; default CUDA where there is one.", show_default=False)]
_DTYPES = ("float32", "float16", "bfloat16")
_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}{end}": 1024**power for power, letter in enumerate("KMGT", 1) for end in ("", "B", "IB")},
}


def names_of(text: str | None) -> list[str] | None:
    """Names separated by commas."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def bytes_of(text: str | None) -> int | None:
    """A number of bytes; KB and KiB both mean 1024.

    Raises:
        UsageError: not such a number.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    if not match or match[2] not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise UsageError(f"--memory-cap is a number of bytes, such as 500MiB or 12GiB; got {text!r}.")
    return size


def resolved(model: str, dtype: str | None) -> None:
    """Refuse what `opened` would, as far as that is known before torch and diffusers are imported, which takes seconds.

    Raises:
        UsageError, DataError: an unknown precision; see `teachers.resolve_teacher`.
    """
    from ..models.teachers import resolve_teacher

    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype is one of {', '.join(_DTYPES)}; got {dtype!r}.")
    resolve_teacher(model)


def opened(model: str, dtype: str | None, device: str | None):
    """The pipeline of a name or folder, on its device and in its precision.

    Raises:
        UsageError, DataError, MissingWeightsError: see `teachers.load_pipeline`; an unknown device.
    """
    import torch

    from ..core.processes import usable_device
    from ..models.teachers import load_pipeline

    where = usable_device(device or "auto")
    pipe = load_pipeline(model)
    return pipe.to(where) if dtype is None else pipe.to(where, getattr(torch, dtype))
