"""The networks of several students as one: every sample goes through that of the student that owns its condition.

    pipe = DiffusionPipeline.from_pretrained("RUN/final")   # after `import diffaccel`
    pipe.unet.max_resident = 1                              # on the GPU at a time; the others stay on disk
    pipe(class_labels=[3, 7, 0])

Because it takes the place of the network, pipelines, schedulers and samplers are those of any other model. A student is
opened when it is first needed.
"""

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_map

from ..core.errors import DataError, UsageError
from ..core.files import write_atomic
from .batches import WITHOUT_BATCH, find_samples, tensor_of
from .conditioning import kind_of
from .partition import Partition, pooled, read_partition

_LIBRARIES = ("diffusers", "diffaccel")
_LOADING = ("torch_dtype", "variant", "use_safetensors", "low_cpu_mem_usage", "disable_mmap")


class MultiStudentModel(ModelMixin, ConfigMixin):
    """Several networks that are called as one; `config` holds what their configurations have in common.

    Args:
        students: networks of one kind, whose widths and depths may differ; or folders of such, opened when needed.
        partition: which of them owns a condition.
        max_resident: how many may be where this model is, at least 1; the one that was not used for longest makes room.
            None for all. Networks that did not come from a folder wait on the CPU.
        **loading: arguments of their `from_pretrained`.

    Raises:
        UsageError: other numbers of networks and of parts.
        DataError: networks that differ in what they take, or folders without one.
    """

    __module__ = "diffaccel"
    config_name = "config.json"

    def __init__(
        self,
        students: Sequence[nn.Module | Path],
        partition: Partition,
        max_resident: int | None = None,
        **loading,
    ):
        super().__init__()
        if len(students) != partition.students:
            raise UsageError(f"There are {len(students)} networks for a partition among {partition.students} students.")
        self.partition, self.max_resident = partition, max_resident
        self.resident = nn.ModuleDict()  # the one that was used last comes last
        first = next((student for student in students if isinstance(student, nn.Module)), None)
        like = {} if first is None else {"dtype": first.dtype, "device": first.device}
        self.register_buffer("anchor", torch.zeros((), **like), persistent=False)  # where students go, and how precise
        self._sources, self._loading = list(students), loading
        configs = [_config(student) for student in students]
        shared = {key: value for key, value in configs[0].items() if all(_same(value, c.get(key)) for c in configs)}
        self.register_to_config(**{key: value for key, value in shared.items() if not key.startswith("_")})
        kinds = {kind_of(SimpleNamespace(config=FrozenDict(config))) for config in configs}
        if len(kinds) > 1:
            raise DataError(f"Students must take the same; these have {' and '.join(sorted(map(str, kinds)))}.")

    def forward(self, *args, return_dict: bool = True, **kwargs):
        """The students' outputs in the order of the samples.

        Args:
            *args, **kwargs: of the networks' own call; ``class_labels`` or ``encoder_hidden_states`` among the named ones.
            return_dict: False for a tuple.

        Raises:
            UsageError: a class that no student owns, or nothing that says which.
        """
        rows = len(find_samples(args, kwargs))
        owners = self._owners(rows, kwargs)
        output = None
        for student in owners.unique().tolist():
            own = torch.nonzero(owners == student)[:, 0]
            some_args, some = (args, kwargs) if len(own) == rows else _rows(args, kwargs, rows, own)
            found = tensor_of(self.student(student)(*some_args, return_dict=False, **some))
            if len(own) == rows:
                output = found
                break
            output = found.new_empty(rows, *found.shape[1:]) if output is None else output
            output[own.to(output.device)] = found
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def student(self, index: int) -> nn.Module:
        """The network of a student, brought here if it is elsewhere.

        Raises:
            UsageError: max_resident below 1.
            DataError: a folder that cannot be opened.
        """
        key = str(index)
        if key in self.resident:
            network = self.resident.pop(key)
        else:
            if self.max_resident is not None and self.max_resident < 1:
                raise UsageError(f"max_resident must be at least 1, got {self.max_resident}.")
            while self.max_resident is not None and len(self.resident) >= self.max_resident:
                oldest = next(iter(self.resident))
                left = self.resident.pop(oldest)
                if isinstance(self._sources[int(oldest)], nn.Module):
                    left.to("cpu")
            source = self._sources[index]
            network = source if isinstance(source, nn.Module) else _open(source, self._loading)
            network.to(self.anchor.device)
            if network.dtype != self.anchor.dtype:
                # Not diffusers' own, which warns of layers to be kept in single precision.
                nn.Module.to(network, self.anchor.dtype)
        self.resident[key] = network
        return network

    def save_pretrained(self, save_directory, safe_serialization: bool = True, variant: str | None = None, **kwargs):
        """Write partition.json and a folder for each student."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for index, source in enumerate(self._sources):
            own = folder / f"student-{index}"
            if isinstance(source, nn.Module):
                source.save_pretrained(own, safe_serialization=safe_serialization, variant=variant)
            elif source.resolve() != own.resolve():
                shutil.copytree(source, own, dirs_exist_ok=True)
        self.partition.save(folder)
        record = {"_class_name": type(self).__name__, "students": self.partition.students}
        write_atomic(folder / self.config_name, json.dumps(record, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Open what `save_pretrained` wrote; the students themselves are opened when they are needed.

        Raises:
            DataError: not such a folder, or not complete.
            UsageError: a device map, which would need them all.
        """
        folder = Path(pretrained_model_name_or_path)
        if kwargs.get("device_map"):
            raise UsageError("Students are moved when they are needed; open them without device_map.")
        loading = {key: kwargs[key] for key in _LOADING if key in kwargs}
        partition = read_partition(folder)
        model = cls([folder / f"student-{index}" for index in range(partition.students)], partition, **loading)
        if isinstance(dtype := kwargs.get("torch_dtype"), torch.dtype):
            model.anchor = model.anchor.to(dtype)
        return model

    def _owners(self, rows: int, kwargs: dict) -> torch.Tensor:
        if self.partition.students == 1:
            return torch.zeros(rows, dtype=torch.long)
        name = "encoder_hidden_states" if self.partition.textual else "class_labels"
        given = kwargs.get(name)
        if given is None:
            raise UsageError(f"{name} must be given by name: it says which student draws.")
        return self.partition.route(pooled(given) if self.partition.textual else given)


def _rows(args: tuple, kwargs: dict, rows: int, index: torch.Tensor) -> tuple[tuple, dict]:
    """Samples ``index`` of everything in a network's arguments that has one entry for each."""

    def select(item):
        if isinstance(item, torch.Tensor) and item.ndim and len(item) == rows:
            return item[index.to(item.device)]
        return item

    named = {name: item if name in WITHOUT_BATCH else tree_map(select, item) for name, item in kwargs.items()}
    return tree_map(select, args), named


def _config(source: nn.Module | Path) -> dict:
    if isinstance(source, nn.Module):
        return dict(source.config)
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{source} holds no network of a student: {error}.") from None
    if not isinstance(config, dict) or not any(source.glob("*.safetensors")):
        raise DataError(f"{source} holds no network of a student: its configuration or its weights are missing.")
    return config


def _open(folder: Path, loading: dict) -> nn.Module:
    name = str(_config(folder).get("_class_name"))
    for library in map(importlib.import_module, _LIBRARIES):
        kind = getattr(library, name, None)
        if isinstance(kind, type) and issubclass(kind, ModelMixin):
            try:
                return kind.from_pretrained(folder, local_files_only=True, **loading)
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise DataError(f"Cannot open the student {folder}: {str(error).strip().splitlines()[0]}") from error
    raise DataError(f"{folder} holds a {name}, which is no network of diffusers or diffaccel.")


def _same(first, second) -> bool:
    return first == second or (isinstance(first, (list, tuple)) and list(first) == list(second or ()))
