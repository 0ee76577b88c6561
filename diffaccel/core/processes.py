"""Several processes under torchrun or `accelerate launch`: who am I, and what did the others find.

Only tensors and JSON travel, never pickles.
"""

import atexit
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .errors import UsageError, error_of

Result = TypeVar("Result")


def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes); (0, 1) outside torchrun and accelerate launch."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), world) if world > 1 else (0, 1)


def is_main_process() -> bool:
    """Whether this process writes and prints: the only one, or rank 0 under torchrun or accelerate launch."""
    return rank_and_world()[0] == 0


class Processes:
    """The processes of one job; a single one needs no set-up and communicates nothing.

    Args:
        device: torch device, or "auto".
        together: share the work with the other processes of the job; all of them must then take part.

    Attributes:
        rank, world: number of this process and of all.
        device: what this process computes on.

    Raises:
        UsageError: a device that is not there.
    """

    def __init__(self, device: str = "auto", together: bool = True):
        self.rank, self.world = rank_and_world() if together else (0, 1)
        self.device = usable_device(device)
        if self.world > 1:
            from accelerate import PartialState

            state = PartialState(cpu=self.device.type == "cpu")  # starts torch.distributed where it was not
            self.device = state.device
            # A process that just ends may abort in gloo's threads, and with it the job, whatever its exit code was.
            atexit.register(state.destroy_process_group)

    def agree(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` on every process and return its result; if it fails on one, all of them raise that error."""
        try:
            result, trouble = work(), None
        except Exception as error:
            if self.world == 1:
                raise
            result, trouble = None, error
        if self.world > 1:
            mine = trouble and [getattr(trouble, "exit_code", 1), str(trouble) or type(trouble).__name__]
            found = self.gather_json(mine)
            failed = [rank for rank, other in enumerate(found) if other]
            if failed:
                error = trouble or error_of(*found[failed[0]])
                error.told_elsewhere = self.rank != failed[0]
                raise error
        return result

    def each(self, tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """What every process passed, in order of rank, on the CPU, one at a time; names and types must be equal."""
        if self.world == 1:
            yield tensors
            return
        import torch.distributed

        shapes = self.gather_json({name: list(tensor.shape) for name, tensor in tensors.items()})
        for rank, theirs in enumerate(shapes):
            found = {}
            for name, tensor in tensors.items():
                shared = (
                    tensor.to(self.device) if rank == self.rank else tensor.new_empty(theirs[name], device=self.device)
                )
                if math.prod(theirs[name]):
                    torch.distributed.broadcast(shared.contiguous() if rank == self.rank else shared, rank)
                found[name] = tensor if rank == self.rank else shared.cpu()
            yield found

    def gather_json(self, content) -> list:
        """What every process passed, in order of rank."""
        if self.world == 1:
            return [content]
        data = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        lengths = [int(part) for part in self.gather(torch.tensor([len(data)]))]
        padded = data.new_zeros(max(lengths))
        padded[: len(data)] = data
        parts = [bytes(part[:n].cpu().numpy()) for part, n in zip(self.gather(padded), lengths, strict=True)]
        return [json.loads(part) for part in parts]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What every process passed, in order of rank, on this process's device; shapes and types must be equal."""
        if self.world == 1:
            return [tensor]
        import torch.distributed

        tensor = tensor.to(self.device)
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(found, tensor)
        return found


def usable_device(name: str) -> torch.device:
    """The torch device of that name, "auto" for CUDA where there is one.

    Raises:
        UsageError: a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception:  # torch raises RuntimeError, AssertionError, NotImplementedError, …
        raise UsageError(f"--device {name!r} is not a device that torch can use here; try cpu.") from None
    return device
