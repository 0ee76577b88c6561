"""How much memory a piece of work takes at its peak."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``run()`` allocates on a device at its peak, beyond what was allocated before.

    On CUDA what PyTorch's allocator hands out (its peak statistics begin anew). Elsewhere the tensors that are alive at once, what operators store
    for themselves meanwhile excepted; that is slower by a few microseconds per operation, and compiled graphs are not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors(device) as live:
        run()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Counts storages from the operation that makes them to their end."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.kind, self.now, self.peak, self._known = device.type, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)  # was there before, or is known
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage.device.type == self.kind:
                self._note(storage, storage.nbytes())
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = size
            weakref.finalize(storage, self._forget, key)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _storages(values):
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()
