"""How conditions are divided among students: blocks of classes, a table, or what prompts are about."""

from pathlib import Path

import torch

from ..core.config import read_yaml
from ..core.errors import DataError, UsageError
from ..models.conditions import Conditions, NoConditions, PromptConditions
from ..models.partition import (
    ClassPartition,
    KMeansPartition,
    Partition,
    QuadrantPartition,
    partition_from,
    pooled,
)

AUTO = "auto"
PARTITIONS = (AUTO, "blocks", "quadrants", "kmeans")


def choose_partition(wanted: str, conditions: Conditions, students: int) -> Partition:
    """The partition of a run.

    Args:
        wanted: "blocks" of consecutive classes; "quadrants" or "kmeans" of prompts; "auto" for blocks of classes and for
            quadrants of prompts, kmeans where the number of students is no power of two; or a YAML or JSON file with
            ``students: [[0, 1], [2, 3, 4]]``, the classes of each, or a partition.json.
        conditions: all of them.
        students: number of parts.

    Raises:
        UsageError: fewer conditions than students, a partition that is not for these conditions or this many students.
        DataError: a file that leaves a class out, names one twice or names one that there is not.
    """
    textual = isinstance(conditions, PromptConditions)
    if isinstance(conditions, NoConditions) and students > 1:
        raise UsageError("This teacher has neither classes nor prompts to divide; set method.students=1.")
    if conditions.count < students:
        raise UsageError(
            f"{conditions.count} conditions cannot be divided among {students} students; lower method.students."
        )
    if wanted == AUTO:
        power_of_two = students & (students - 1) == 0
        wanted = ("quadrants" if power_of_two else "kmeans") if textual else "blocks"
    if wanted in PARTITIONS:
        if (wanted != "blocks") != textual:
            what, other = ("prompts", "quadrants or kmeans") if textual else ("classes", "blocks or a file")
            raise UsageError(f"{wanted} cannot divide {what}; set method.partition to {other}.")
        if wanted == "blocks":
            return blocks(conditions.count, students)
        return (quadrants if wanted == "quadrants" else kmeans)(features(conditions), students)
    partition = _from_file(Path(wanted), conditions.count)
    if partition.textual != textual:
        raise UsageError(
            f"{wanted} divides {'prompts' if partition.textual else 'classes'}, which this teacher does not draw."
        )
    if partition.students != students:
        raise UsageError(f"{wanted} is for {partition.students} students; set method.students={partition.students}.")
    return partition


def features(conditions: Conditions) -> torch.Tensor:
    """What a partition routes by: classes (N,) int64, or pooled text states (N, width)."""
    if isinstance(conditions, PromptConditions):
        return pooled(conditions.states["encoder_hidden_states"])
    return torch.arange(conditions.count)


def members(partition: Partition, conditions: Conditions, student: int) -> torch.Tensor:
    """The conditions (M,) int64 of one student, in order."""
    if partition.students == 1:
        return torch.arange(conditions.count)
    return torch.nonzero(partition.route(features(conditions)) == student)[:, 0]


def blocks(classes: int, students: int) -> ClassPartition:
    """Consecutive classes, in parts whose sizes differ by one at most."""
    owners = [label * students // classes for label in range(classes)]
    return ClassPartition(tuple(tuple(c for c, owner in enumerate(owners) if owner == k) for k in range(students)))


def table(rows, classes: int, source: str) -> ClassPartition:
    """The partition that lists the classes of each student.

    Raises:
        DataError: a class that is left out, named twice or not there, or a student without one.
    """
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in rows):
        raise DataError(f"{source} must list the classes of each student: students: [[0, 1], [2, 3, 4]].")
    named = [label for row in rows for label in row]
    known = [label for label in named if type(label) is int and 0 <= label < classes]
    missing = [label for label in range(classes) if label not in known]
    twice = sorted({label for label in known if known.count(label) > 1})
    strange = [label for label in named if type(label) is not int or not 0 <= label < classes]
    empty = [index for index, row in enumerate(rows) if not row]
    wrong = [
        f"{what} {', '.join(map(str, which))}"
        for what, which in (
            ("no student has", missing),
            ("more than one student has", twice),
            (f"unknown beside 0 … {classes - 1}:", strange),
            ("nothing is left for student", empty),
        )
        if which
    ]
    if wrong:
        raise DataError(f"{source} does not divide the {classes} classes: {'; '.join(wrong)}.")
    return ClassPartition(tuple(map(tuple, rows)))


def quadrants(states: torch.Tensor, students: int) -> QuadrantPartition:
    """Halves at the median of the first principal direction, those at their medians of the second, and so on.

    The median of each half in place of the common one keeps the parts equal where directions depend on each other.

    Args:
        states: (N, width).
        students: a power of two.

    Raises:
        UsageError: another number of students.
    """
    if students & (students - 1):
        raise UsageError(
            f"Quadrants divide prompts among 2, 4, 8 … students, got {students}; set method.partition=kmeans."
        )
    x = states.double()
    directions, levels = _principal(x)[: students.bit_length() - 1], []
    part = torch.zeros(len(x), dtype=torch.long)
    for level, direction in enumerate(directions):
        projected = x @ direction
        cuts = torch.stack([projected[part == index].quantile(0.5) for index in range(2**level)])
        part = 2 * part + (projected > cuts[part]).long()
        levels.append(tuple(cuts.tolist()))
    return QuadrantPartition(tuple(tuple(row) for row in directions.tolist()), tuple(levels))


def kmeans(states: torch.Tensor, students: int, rounds: int = 20) -> KMeansPartition:
    """Parts of equal size with small spread: Lloyd's iterations in which prices balance the assignment.

    Args:
        states: (N, width).
        students: number of parts.
        rounds: of centroids.
    """
    x = states.double()
    order = (x @ _principal(x)[0]).argsort(stable=True)
    owner = torch.empty(len(x), dtype=torch.long)
    owner[order] = torch.arange(len(x)) * students // len(x)
    for _ in range(rounds):
        parts = [x[owner == k] for k in range(students)]
        centroids = torch.stack([(own if len(own) else x).mean(0) for own in parts])
        cost = torch.cdist(x, centroids).square()
        prices, previous = _balancing_prices(cost), owner
        owner = (cost + prices).argmin(1)
        if torch.equal(owner, previous):
            break
    return KMeansPartition(tuple(tuple(row) for row in centroids.tolist()), tuple(prices.tolist()))


def _principal(x: torch.Tensor) -> torch.Tensor:
    """Principal directions (width, width) of samples (N, width), the first one first, their largest entry positive."""
    directions = torch.linalg.eigh(torch.cov(x.T, correction=0)).eigenvectors.flip(1).T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign()


def _balancing_prices(cost: torch.Tensor) -> torch.Tensor:
    """Prices (K,) at which each column of cost (N, K) is the cheapest for as many rows: optimal transport, annealed."""
    prices = cost.new_zeros(cost.shape[1])
    for halvings in range(12):
        temperature = float(cost.std()) * 0.5**halvings + 1e-12
        for _ in range(20):
            share = torch.softmax(-(cost + prices) / temperature, 1).mean(0) * cost.shape[1]
            prices = prices + temperature * share.clamp_min(1e-12).log()
    return prices - prices.mean()


def _from_file(file: Path, classes: int) -> Partition:
    data = read_yaml(file)
    if data.get("kind", "classes") != "classes":
        return partition_from(data, str(file))
    params = data.get("params")
    return table(params.get("members") if isinstance(params, dict) else data.get("students"), classes, str(file))
