"""Checkpoints: safetensors and JSON in one folder that either exists completely or not at all."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..core.errors import DataError
from ..core.files import atomic_directory, verify_manifest

SCHEMA = 1
_NAME = re.compile(r"step-(\d{8})")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's per-parameter state as flat tensors "index.name"; hyper-parameters belong to the config."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value.contiguous() for index, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], record: dict[str, Any], keep: int
) -> Path:
    """Write folder/step-XXXXXXXX with one safetensors file per entry of ``tensors``; then drop all but ``keep``.

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
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def latest_checkpoint(folder: Path, warn) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose every file matches its manifest, with its trainer.json; None if there is none.

    Args:
        warn: called with one sentence for each newer checkpoint that had to be passed over.

    Raises:
        DataError: the checkpoint was written by a newer version of the package.
    """
    for path in reversed(list_checkpoints(folder)):
        problems = verify_manifest(path)
        if problems:
            warn(f"Passing over the damaged checkpoint {path.name}: {problems[0]}")
            continue
        record = json.loads((path / "trainer.json").read_text())
        if record["schema"] > SCHEMA:
            raise DataError(f"{path} has checkpoint schema {record['schema']}; this version reads up to {SCHEMA}.")
        return path, record
    return None


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
    own = module.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in tensors]
    wrong += [f"{key} is not expected" for key in tensors if key not in own]
    wrong += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"{source} does not fit the model: {'; '.join(wrong[:3])}{more}.")
    module.load_state_dict(tensors)
