"""Which of several students owns a condition: a function of its class, or of what the text encoder says of a prompt."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..core.errors import DataError, UsageError
from ..core.files import write_atomic

FILE = "partition.json"


class Partition(ABC):
    """Disjoint parts of all conditions, one for each student (Song et al. 2025, MSD, section 4.1).

    Attributes:
        kind: its name in files.
        textual: whether prompts are divided; else classes.
    """

    kind: ClassVar[str]
    textual: ClassVar[bool] = True

    @property
    @abstractmethod
    def students(self) -> int:
        """Number of parts."""

    @abstractmethod
    def route(self, conditions: torch.Tensor) -> torch.Tensor:
        """The owners (B,) int64, on the CPU, of classes (B,) int64 or of `pooled` text states (B, width).

        Raises:
            UsageError: a class that no student owns.
        """

    def agrees(self, other: "Partition") -> bool:
        """Whether another partition is this one, up to the rounding of the machine on which it was made."""
        own, theirs = ([_flat(value) for value in asdict(one).values()] for one in (self, other))
        if self.kind != other.kind or [len(value) for value in own] != [len(value) for value in theirs]:
            return False
        if not self.textual:
            return self == other
        return all(
            torch.allclose(_tensor(a), _tensor(b), rtol=1e-3, atol=1e-6) for a, b in zip(own, theirs, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in partition.json."""
        return {"kind": self.kind, "params": asdict(self)}

    def save(self, folder: Path) -> None:
        """Write partition.json into a folder."""
        write_atomic(folder / FILE, json.dumps(self.to_dict()) + "\n")


@dataclass(frozen=True)
class ClassPartition(Partition):
    """Attributes:
    members: the classes of each student.

    Raises:
        ValueError: a class that is left out or named twice, or a student without one; and so for the others.
    """

    kind = "classes"
    textual = False

    members: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        named = sorted(label for own in self.members for label in own)
        if not all(self.members) or named != list(range(len(named))):
            raise ValueError(f"classes {named}")

    @property
    def students(self):
        return len(self.members)

    @property
    def owners(self) -> torch.Tensor:
        """(classes,) int64: the student of each class."""
        owner = {label: student for student, own in enumerate(self.members) for label in own}
        return torch.tensor([owner[label] for label in range(len(owner))])

    def route(self, conditions):
        labels, owners = conditions.cpu(), self.owners
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(owners):
            raise UsageError(
                f"These students own classes 0 … {len(owners) - 1} and none without class: their guidance is in their weights, "
                f"so leave guidance out; got {sorted(set(labels.tolist()))}."
            )
        return owners[labels]


@dataclass(frozen=True)
class QuadrantPartition(Partition):
    """Halves of halves: at each level the sign of x·direction against the median of the part that it divides.

    Attributes:
        directions: (levels, width), principal directions of the prompts it was made for.
        cuts: for each level the thresholds of its 2^level parts.
    """

    kind = "quadrants"

    directions: tuple[tuple[float, ...], ...]
    cuts: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        if self.directions:
            _tensor(self.directions)
        if [len(cuts) for cuts in self.cuts] != [2**level for level in range(len(self.directions))]:
            raise ValueError(f"{[len(cuts) for cuts in self.cuts]} cuts along {len(self.directions)} directions")

    @property
    def students(self):
        return 2 ** len(self.cuts)

    def route(self, conditions):
        x = conditions.cpu().double()
        part = torch.zeros(len(x), dtype=torch.long)
        for direction, cuts in zip(self.directions, self.cuts, strict=True):
            projected, thresholds = x @ _tensor(direction), _tensor(cuts)
            part = 2 * part + (projected > thresholds[part]).long()
        return part


@dataclass(frozen=True)
class KMeansPartition(Partition):
    """The nearest centroid, with a price on each that keeps the parts of equal size: a power diagram.

    Attributes:
        centroids: (students, width).
        prices: (students,), added to squared distances.
    """

    kind = "kmeans"

    centroids: tuple[tuple[float, ...], ...]
    prices: tuple[float, ...]

    def __post_init__(self):
        if not self.prices or len(_tensor(self.centroids)) != len(_tensor(self.prices)):
            raise ValueError(f"{len(self.prices)} prices")

    @property
    def students(self):
        return len(self.prices)

    def route(self, conditions):
        x, centroids = conditions.cpu().double(), _tensor(self.centroids)
        return (torch.cdist(x, centroids).square() + _tensor(self.prices)).argmin(1)


_KINDS = {kind.kind: kind for kind in (ClassPartition, QuadrantPartition, KMeansPartition)}


def pooled(states: torch.Tensor) -> torch.Tensor:
    """Text states (B, tokens, width) as one vector each, the mean over tokens: (B, width) float32."""
    return states.float().mean(1)


def partition_from(data: Mapping[str, Any], source: str) -> Partition:
    """Inverse of `Partition.to_dict`.

    Args:
        data: plain data.
        source: where it is from, for the error.

    Raises:
        DataError: no partition.
    """
    try:
        kind, params = _KINDS[data["kind"]], data["params"]
        number = int if kind is ClassPartition else float
        return kind(**{name: _tuples(value, number) for name, value in params.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source} holds no partition: {type(error).__name__} {error}.") from None


def read_partition(folder: Path) -> Partition:
    """The partition.json of a folder.

    Raises:
        DataError: missing or damaged.
    """
    file = folder / FILE
    try:
        return partition_from(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"Cannot read {file}: {error}.") from None


def _tuples(value, kind: type):
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(item, kind) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no {'class' if kind is int else 'number'}")
    return kind(value)


def _flat(value) -> list[float]:
    return [number for item in value for number in _flat(item)] if isinstance(value, tuple) else [value]


def _tensor(values: Sequence) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
