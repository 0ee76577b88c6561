"""Groups for the jackknife: a pure function of a sample's position and class."""

import torch

from ..core.errors import DataError
from ..core.rng import KeyedRandom

GROUPS = 10


def assign_groups(labels: torch.Tensor | None, count: int, groups: int = GROUPS) -> torch.Tensor:
    """Assign samples to groups with the same mix of classes and, within one, the same size.

    Of every K consecutive samples of a class each group gets one, in an order drawn from their index. The result does
    not depend on batches, processes or skipped samples, and does not line up with a pattern in the order of samples.

    Args:
        labels: (count,) integer classes of a sample whose class proportions were fixed (labels in turn, a stratified
            split). None means independent draws; a fixed mix without labels has too much bias removed.
        count: samples, in their full order.
        groups: number K of groups.

    Returns:
        (count,) int64 in [0, K).

    Raises:
        DataError: another number of labels than samples.
    """
    classes, index, sizes = within_classes(labels, count)
    blocks = -(-int(sizes.max()) // groups) if count else 0
    order = KeyedRandom(0).uniform("jackknife group", 0, 0, blocks, (groups,)).argsort(dim=1, stable=True)
    # Classes start at different places of one order, so that their remainders fill different groups.
    return order[index // groups, (index + classes) % groups]


def stratified_order(
    labels: torch.Tensor | None, count: int, random: KeyedRandom, purpose: str, step: int
) -> torch.Tensor:
    """A random order of the samples (count,), int64, in which every beginning has the mix of classes of the whole.

    Args:
        labels, count: see `assign_groups`; without labels every order is equally likely.
        random, purpose, step: the stream that the order is drawn from.

    Raises:
        DataError: another number of labels than samples.
    """
    shuffled = random.permutation(purpose, step, count)
    if labels is None:
        return shuffled
    _, index, sizes = within_classes(labels.cpu()[shuffled], count)
    place = (index + random.uniform(f"{purpose} place", step, 0, count)) / sizes  # in [0, 1), even for each class
    return shuffled[place.argsort(stable=True)]


def within_classes(labels: torch.Tensor | None, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Class of each sample counted from 0, its index within the class, and the size of the class; (count,) int64.

    Raises:
        DataError: another number of labels than samples.
    """
    labels = torch.zeros(count, dtype=torch.long) if labels is None else labels.cpu().long()
    if labels.shape != (count,):
        raise DataError(f"Got labels of shape {tuple(labels.shape)} for {count} samples; every sample needs one.")
    _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
    members = classes.argsort(stable=True)  # class by class
    index = torch.empty(count, dtype=torch.long)
    index[members] = torch.arange(count) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return classes, index, sizes[classes]
