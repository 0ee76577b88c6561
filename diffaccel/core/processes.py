"""Several processes under torchrun or `accelerate launch`: who am I, and what did the others find.

Only tensors and JSON travel, never pickles.
"""

import json
import os

import numpy as np
import torch


def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes); (0, 1) outside torchrun and accelerate launch."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


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
    """

    def __init__(self, device: str = "auto", together: bool = True):
        self.rank, self.world = rank_and_world() if together else (0, 1)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.world > 1:
            from accelerate import PartialState

            state = PartialState(cpu=self.device.type == "cpu")  # starts torch.distributed where it was not
            self.device = state.device

    def gather_tensors(self, tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """What every process passed, in order of rank, on the CPU; equal names and types, lengths may differ."""
        if self.world == 1:
            return [tensors]
        shapes = self.gather_json({name: list(tensor.shape) for name, tensor in tensors.items()})
        found = [{} for _ in range(self.world)]
        for name, tensor in tensors.items():
            for rank, flat in enumerate(self._gather_flat(tensor.reshape(-1))):
                found[rank][name] = flat[: int(np.prod(shapes[rank][name]))].reshape(shapes[rank][name])
        return found

    def gather_json(self, content) -> list:
        """What every process passed, in order of rank."""
        if self.world == 1:
            return [content]
        data = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        lengths = [int(part) for part in self._gather_equal(torch.tensor([len(data)]))]
        parts = self._gather_flat(data)
        return [json.loads(bytes(part[:n].numpy())) for part, n in zip(parts, lengths, strict=True)]

    def _gather_flat(self, flat: torch.Tensor) -> list[torch.Tensor]:
        longest = int(max(self._gather_equal(torch.tensor([flat.numel()]))))
        padded = flat.new_zeros(longest)
        padded[: flat.numel()] = flat
        return self._gather_equal(padded)

    def _gather_equal(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        import torch.distributed

        tensor = tensor.to(self.device)
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(found, tensor)
        return [part.cpu() for part in found]
