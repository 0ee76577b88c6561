"""Models of transformers as extractors use them: found on this machine first, read from safetensors only, silently."""

import hashlib
import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.errors import DataError, MissingWeightsError
from ...models.quiet import quiet_transformers
from .base import FeatureExtractor

_CONFIG, _TENSORS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Architecture:
    """What an extractor takes from transformers.

    Attributes:
        model: name of the class there.
        model_type: what config.json must say.
        default: hub repository that published numbers use.
        option: how a folder is given on the command line.
        extras: files beside configuration and tensors that are fetched with them.
    """

    model: str
    model_type: str
    default: str
    option: str
    extras: tuple[str, ...] = ()


class PretrainedFeatures(FeatureExtractor):
    """What extractors from model folders share: opening one, the scale of its pixels, and its identity.

    Attributes:
        architecture: what the folder must hold.
        mean, deviation: of the training images per channel, pixels on [0, 1].
    """

    channels = 3
    resizes = True
    architecture: Architecture
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def _open(self, weights, download: bool) -> Path:
        """Find the folder, load its model in evaluation mode, and return the folder."""
        folder = find_folder(self.architecture, weights, download)
        self._sha256 = tensors_sha256(tensor_files(folder, self.architecture))
        self.model = load_model(folder, self.architecture)
        self.register_buffer("_mean", torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_deviation", torch.tensor(self.deviation).view(3, 1, 1), persistent=False)
        self.eval()
        return folder

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels / 255 - self._mean) / self._deviation

    def weights_sha256(self) -> str:
        """SHA-256 over the tensors in the files (see `tensors_sha256`)."""
        return self._sha256


def find_folder(architecture: Architecture, weights=None, download: bool = False) -> Path:
    """Find the folder of a model without importing transformers; the hub is asked only if it is not on this machine.

    Args:
        architecture: the kind of model.
        weights: a folder with config.json and model.safetensors (also in shards), or a hub repository; None for the
            default repository.
        download: allow missing files to be fetched.

    Raises:
        DataError: a folder without these files, with pickled weights only, or a name that cannot be on the hub.
        MissingWeightsError: a hub repository that is not on this machine and was not, or could not be, fetched.
    """
    name = str(weights or architecture.default)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / _CONFIG).is_file():
            raise DataError(f"{folder} is not a model folder (no {_CONFIG}); give one with {_CONFIG} and {_TENSORS}.")
        tensor_files(folder, architecture)
        return folder
    if folder.exists():
        raise DataError(f"{folder} is a single file; give the folder that holds {_CONFIG} and {_TENSORS}.")
    if not _HUB_NAME.fullmatch(name) or ".." in name or "--" in name:
        raise DataError(f"There is no folder {name}, and it is not a hub name either (those read owner/name).")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, _CONFIG)
    folder = Path(cached).parent if isinstance(cached, str) else None
    if folder and any((folder / file).is_file() for file in (_TENSORS, _INDEX)):
        return folder
    if not download:
        files = " ".join((_CONFIG, _TENSORS, *architecture.extras))
        raise MissingWeightsError(
            f"There is no folder {name}, and no hub model of that name on this machine; nothing is downloaded "
            f"silently. Give a folder with {_CONFIG} and {_TENSORS} ({architecture.option}), or fetch it with "
            f"`hf download {name} {files}`, or allow it with --download."
        )
    folder = _download(name, architecture)
    if not (folder / _CONFIG).is_file() or not any((folder / file).is_file() for file in (_TENSORS, _INDEX)):
        raise MissingWeightsError(
            f"{name} does not publish {_CONFIG} with {_TENSORS}. {_conversion(architecture, name)}"
        )
    return folder


def _download(name: str, architecture: Architecture) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    patterns = [_CONFIG, _TENSORS, _INDEX, "model-*.safetensors", *architecture.extras]
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated, timed out: each library version raises its own kinds
        raise MissingWeightsError(
            f"Cannot fetch {name} from the hub: {_reason(error)} Copy a folder with {_CONFIG} and {_TENSORS} to this "
            f"machine and give it: {architecture.option}."
        ) from error
    finally:
        if not silent:
            enable_progress_bars()


def tensor_files(folder: Path, architecture: Architecture) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        DataError: none there, a shard is missing, or the weights are pickled only.
    """
    if (folder / _TENSORS).is_file():
        return [folder / _TENSORS]
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(_json(folder / _INDEX)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{folder / _INDEX} is damaged: it does not name the files of the tensors.") from error
        for name in names:  # in the hub's cache files are links, so only the name can say that it stays in the folder
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
                raise DataError(f"{folder} lacks {name}, one of the {len(names)} safetensors files that it names.")
        return [folder / name for name in names]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise DataError(
            f"{folder} holds its weights as {pickled[0]} only; such files can run code and are not opened. "
            f"{_conversion(architecture, folder)}"
        )
    raise DataError(f"{folder} has no {_TENSORS}.")


def _conversion(architecture: Architecture, source) -> str:
    code = (
        f"from transformers import {architecture.model} as M; M.from_pretrained('{source}').save_pretrained('FOLDER')"
    )
    return f'If you trust it, convert it with `python -c "{code}"` and give {architecture.option}.'


def tensors_sha256(files: list[Path]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors in safetensors files.

    Taken from the files, since transformers renames parameters between versions: a model in memory would get another
    hash after an upgrade, and saved statistics would be refused.

    Raises:
        DataError: a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    digest = hashlib.sha256()
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            for name, file in sorted((name, i) for i, part in enumerate(opened) for name in part.keys()):  # noqa: SIM118
                tensor = opened[file].get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{files[0]} is damaged or not safetensors: {_reason(error)} Get it again.") from error
    return digest.hexdigest()


def load_model(folder: Path, architecture: Architecture):
    """Open a model in float32, frozen, in evaluation mode; every parameter must come from the files.

    Raises:
        DataError: a damaged folder, or the model of another architecture.
    """
    config = _json(folder / _CONFIG)
    got = config.get("model_type") if isinstance(config, dict) else None
    if got != architecture.model_type:
        raise DataError(
            f"{folder} is a model of type {got!r}; expected {architecture.model_type!r}, as {architecture.default} is."
        )
    import transformers

    with quiet_transformers():
        try:
            model, info = getattr(transformers, architecture.model).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # wrong shapes, odd configurations: transformers raises many kinds
            raise DataError(f"Cannot open {folder} as {architecture.model}: {_reason(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        raise DataError(f"{folder} lacks {len(missing)} of the tensors of its model, the first is {missing[0]}.")
    return model.float().eval().requires_grad_(False)


def _json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{(lines[0] if lines else type(error).__name__).rstrip('.')}."
