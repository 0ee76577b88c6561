"""What processes computed of one batch, gathered once per evaluation."""

import hashlib

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.errors import NumericalError
from ..core.processes import Processes

_HEADER = 8  # bytes at the beginning of a message, about the shapes of a call
_SUMS = 16  # bytes at its end, about the values


class Exchange:
    """Gathers what processes return, and tells when they were called with different arguments.

    A message is as long as that of the call before, which all processes know; only where shapes change, there are two.

    Args:
        processes: those of the job; all take part in every call.
    """

    def __init__(self, processes: Processes):
        self._processes, self._header, self._length = processes, bytes(_HEADER), 0

    def gather(self, mine, given: list[torch.Tensor]) -> list:
        """What all processes returned, in order of rank.

        Args:
            mine: what this one returned, tensors in any containers.
            given: the tensors with which every process was called.

        Raises:
            NumericalError: these differ; in all processes.
        """
        leaves, form = tree_flatten(mine)
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        packed = [_bytes_of(tensor) for tensor in tensors] + [_bytes_of(_sums(given))]
        outputs = []
        for theirs in self._messages(torch.cat([one.to(packed[0].device) for one in packed]), _header(given)):
            parts = theirs.split([len(one) for one in packed])
            values = iter(
                [part.clone().view(old.dtype).view(old.shape) for part, old in zip(parts, tensors, strict=False)]
            )
            outputs.append(
                tree_unflatten([next(values) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], form)
            )
        return outputs

    def _messages(self, packed: torch.Tensor, header: bytes) -> list[torch.Tensor]:
        known = header == self._header
        begin = torch.tensor(list(header), dtype=torch.uint8, device=packed.device)
        found = self._processes.gather(torch.cat([begin, packed if known else packed.new_zeros(self._length)]))
        _check_equal([one[:_HEADER] for one in found])
        if not known:
            self._header, self._length = header, len(packed)
            return self._messages(packed, header)
        _check_equal([one[-_SUMS:] for one in found])
        return [one[_HEADER:] for one in found]


def _check_equal(found: list[torch.Tensor]) -> None:
    if not bool((torch.stack(found) == found[0]).all()):
        raise NumericalError(
            "The processes call the network with different arguments: give every one of them the same prompts, sizes and "
            "generator=torch.Generator().manual_seed(0)."
        )


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _header(tensors: list[torch.Tensor]) -> bytes:
    form = str([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
    return hashlib.sha256(form.encode()).digest()[:_HEADER]


def _sums(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Exact sums over the bytes of tensors, one of them weighted by place; shape (2,), int64."""
    device, total = tensors[0].device, torch.zeros(2, dtype=torch.int64, device=tensors[0].device)
    for index, tensor in enumerate(tensors, 1):
        numbers = _bytes_of(tensor.detach().contiguous()).to(device, torch.int64)
        places = torch.arange(len(numbers), device=device) % 251 + index
        total += torch.stack([numbers.sum() * index, (numbers * places).sum()])
    return total
