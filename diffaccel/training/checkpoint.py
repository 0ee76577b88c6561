"""Checkpoints: safetensors and JSON in one folder that either exists completely or not at all."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..core.errors import DataError
from ..core.files import atomic_directory, verify_manifest

SCHEMA = 1
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], record: dict[str, Any], keep: int
) -> Path:
    """Write folder/step-XXXXXXXX with one safetensors file per entry of ``tensors``; then drop all but ``keep``.

    Later ones are dropped too: they were passed over when the run was resumed, and must not outlive good ones.

    Args:
        tensors: file name without ending → tensors by name.
        record: JSON-able facts stored as trainer.json.
    """
    target = folder / f"step-{step:08d}"
    if target.exists():  # a damaged one that was not resumed from, or the same step saved twice
        shutil.rmtree(target)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_directory(target) as temporary:
        for name, values in tensors.items():
            save_file({key: value.contiguous() for key, value in values.items()}, temporary / f"{name}.safetensors")
        (temporary / "trainer.json").write_text(json.dumps({"schema": SCHEMA, "step": step, **record}, indent=2) + "\n")
    found = list_checkpoints(folder)
    here = found.index(target) + 1
    for other in found[: max(0, here - keep)] + found[here:]:
        shutil.rmtree(other)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def load_newest(folder: Path, load: Callable[[Path], None], warn: Callable[[str], object]) -> int:
    """Load the newest checkpoint that is intact and fits; return its step, 0 if the folder has no checkpoint.

    Args:
        load: loads a checkpoint that is intact; raises DataError if it does not fit.
        warn: called with one sentence for each checkpoint that had to be passed over.

    Raises:
        DataError: there are checkpoints, but none that can be used, or one of a newer version of the package.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        problems = verify_manifest(path)
        if not problems:
            record = json.loads((path / "trainer.json").read_text())
            if record["schema"] > SCHEMA:
                raise DataError(f"{path} has checkpoint schema {record['schema']}; this version reads up to {SCHEMA}.")
            try:
                load(path)
                return record["step"]
            except DataError as error:
                problems = [str(error)]
        warn(f"Passing over the checkpoint {path.name}: {problems[0]}")
    if found:
        raise DataError(
            f"None of the checkpoints in {folder} can be used; the oldest: {problems[0]} Start a new run in another folder."
        )
    return 0


def read_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Load one safetensors file of a checkpoint.

    Raises:
        DataError: missing or unreadable.
    """
    file = path / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"Cannot read {file}: {error}.") from None


def load_module(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load weights strictly.

    Raises:
        DataError: names or shapes differ; the first few are listed.
    """
    check_tensors(module.state_dict(), tensors, source)
    module.load_state_dict(tensors)


def check_tensors(own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse tensors that have other names or shapes than one's own.

    Args:
        source: what the tensors are, for the error.

    Raises:
        DataError: the first few differences are listed.
    """
    wrong = [f"{key} is missing" for key in own if key not in tensors]
    wrong += [f"{key} is not expected" for key in tensors if key not in own]
    wrong += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    refuse(wrong, source)


def refuse(wrong: list[str], source: str) -> None:
    """Raise the DataError that lists the first few of what is wrong, if anything is."""
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"{source} does not fit the model: {'; '.join(wrong[:3])}{more}.")
