"""Halves of the arguments of a network call: the branches of a guidance pair."""

from ..core.errors import GuidanceError
from ..models.batches import SAMPLE, find_samples, part


def half(value, rows: int, index: int):
    """One half of the arguments of a network call; see `models.batches.part`."""
    return part(value, rows, index)


def samples_of(args: tuple, kwargs: dict):
    """The samples, a tensor (rows, …) or a list of tensors, in a call of a network.

    Raises:
        GuidanceError: none of its arguments is known to be that.
    """
    found = find_samples(args, kwargs)
    if found is None:
        raise GuidanceError(
            f"This pipeline calls its network without an argument named {' or '.join(SAMPLE)} ({', '.join(kwargs)}); such "
            "networks cannot be guided."
        )
    return found


def rows_of(args: tuple, kwargs: dict) -> int:
    """Samples in a call of a network; see `samples_of`."""
    return len(samples_of(args, kwargs))
