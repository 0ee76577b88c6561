"""A network's batch in parts: one after the other, which takes less memory, or each on its own process, which takes less time.

Pipelines with classifier-free guidance give their network a batch of both branches. Its rows do not depend on each other,
so the network is given parts of the batch, and nothing else of the pipeline changes. Several images are parted likewise.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..core.errors import NumericalError, UsageError
from ..core.processes import Processes
from ..core.standins import subclass
from ..models.networks import eager, networks_of

# Arguments that belong to all rows together: positions of tokens.
_SHARED = ("img_ids", "txt_ids", "image_rotary_emb")


class Parted:
    """What `sequential_cfg` and `parallel_cfg` return.

    Attributes:
        parted: calls of networks whose batch was parted.
        whole: calls that ran as they came, because their rows cannot be parted evenly.
    """

    def __init__(self, networks: dict[str, nn.Module], call: Callable):
        self.parted = self.whole = 0
        self._changed = []
        for network in map(eager, networks.values()):
            former = type(network)
            network.__class__ = subclass(former, __call__=self._calling(former.__call__, call), _parted=True)
            self._changed.append((network, former, type(network)))

    def undo(self) -> None:
        """Give every network its class back; without effect the second time."""
        for network, former, ours in self._changed:
            if type(network) is ours:
                network.__class__ = former

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()

    def _calling(self, parent: Callable, call: Callable) -> Callable:
        def __call__(network, *args, **kwargs):
            result = call(lambda part: parent(network, *part[0], **part[1]), args, kwargs)
            self.parted += result is not None
            self.whole += result is None
            return parent(network, *args, **kwargs) if result is None else result

        return __call__


def sequential_cfg(pipe_or_network, parts: int = 2) -> Parted:
    """Evaluate the branches of guidance one after the other instead of as one batch, until ``undo``.

        with diffaccel.sequential_cfg(pipe):
            image = pipe("a red apple").images[0]

    Activations take about half of the memory. Results agree up to rounding, since kernels may depend on the size of a batch.

    Args:
        pipe_or_network: any diffusers pipeline, or its network.
        parts: into how many the rows of a batch are divided, where their number allows it.

    Raises:
        UsageError: neither pipeline nor network, less than two parts, or a network whose batch is parted already.
    """
    if not isinstance(parts, int) or parts < 2:
        raise UsageError(f"parts is a whole number from 2; got {parts!r}.")

    def call(evaluate, args, kwargs):
        divided = divide(args, kwargs, parts)
        return divided and join([evaluate(part) for part in divided])

    return Parted(_unparted(pipe_or_network), call)


def parallel_cfg(pipe_or_network) -> Parted:
    """Evaluate the branches of guidance on several processes at once, until ``undo``.

        # torchrun --nproc_per_node 2 draw.py
        pipe.to(f"cuda:{os.environ['LOCAL_RANK']}")
        with diffaccel.parallel_cfg(pipe):
            image = pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]

    Every process runs the pipeline with the same arguments and ends with the same image. Once per evaluation, each computes
    its rows of the batch and all gather them, so results equal those of `sequential_cfg` in one process in every bit, on
    equal hardware. For inference: with gradients, the whole batch is evaluated by everyone.

    Args:
        pipe_or_network: any diffusers pipeline, or its network, on the device of this process.

    Raises:
        UsageError: a single process, neither pipeline nor network, or a network whose batch is parted already.
        NumericalError: later, when processes call the network with different numbers.
    """
    networks = _unparted(pipe_or_network)
    device = next(iter(networks.values())).device
    processes = Processes(str(device))
    if processes.world == 1:
        raise UsageError(
            "Guidance on several processes needs them: start this with `torchrun --nproc_per_node 2 FILE.py`, or use "
            "sequential_cfg in one process."
        )
    if any(network.device.type != processes.device.type for network in networks.values()):
        raise UsageError(
            f"The network is on {device}, but this process computes on {processes.device}: move the pipeline there."
        )

    def call(evaluate, args, kwargs):
        divided = None if torch.is_grad_enabled() else divide(args, kwargs, processes.world)
        return divided and join(_gather(evaluate(divided[processes.rank]), _rows_of(args, kwargs), processes))

    return Parted(networks, call)


def divide(args: tuple, kwargs: dict, parts: int) -> list[tuple[tuple, dict]] | None:
    """The arguments of a call in equal parts by rows, the first tensor's first dimension.

    Returns:
        (args, kwargs) of each part; None where rows are no multiple of ``parts``, or where a tensor has another number of rows,
        so that it is not known what belongs together.
    """
    rows = len(_rows_of(args, kwargs))
    if rows % parts:
        return None
    size, known = rows // parts, True

    def part(value, index):
        nonlocal known
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) == 1:
            return value
        known &= len(value) == rows
        return value[index * size : (index + 1) * size]

    divided = []
    for index in range(parts):
        given = {
            name: value if name in _SHARED else tree_map(lambda leaf: part(leaf, index), value)  # noqa: B023
            for name, value in kwargs.items()
        }
        divided.append((tuple(tree_map(lambda leaf: part(leaf, index), value) for value in args), given))  # noqa: B023
    return divided if known else None


def join(outputs: list):
    """What a network would have returned for all rows, from what it returned for parts of them."""
    leaves = [tree_flatten(output) for output in outputs]
    joined = [
        torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0]
        for parts in zip(*(values for values, _ in leaves), strict=True)
    ]
    return tree_unflatten(joined, leaves[0][1])


def _gather(mine, rows: torch.Tensor, processes: Processes) -> list:
    """What all processes returned, in order of rank, by one exchange that also tells whether they were given the same rows."""
    leaves, form = tree_flatten(mine)
    tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    packed = [_bytes_of(tensor) for tensor in tensors] + [_bytes_of(_fingerprint(rows))]
    found = processes.gather(torch.cat(packed))
    lengths = [len(part) for part in packed]
    parts = [part.split(lengths) for part in found]
    if any(not torch.equal(part[-1], parts[0][-1]) for part in parts):
        raise NumericalError(
            "The processes call the network with different numbers: give every one of them the same prompt and "
            "generator=torch.Generator().manual_seed(0)."
        )
    return [tree_unflatten(_unpacked(part[:-1], tensors, leaves), form) for part in parts]


def _unpacked(parts, like: list[torch.Tensor], leaves: list) -> list:
    tensors = iter([part.clone().view(old.dtype).view(old.shape) for part, old in zip(parts, like, strict=True)])
    return [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _fingerprint(rows: torch.Tensor) -> torch.Tensor:
    """Two exact sums over the bytes of a tensor, one of which depends on their order."""
    numbers = _bytes_of(rows.contiguous()).long()
    places = torch.arange(len(numbers), device=numbers.device) % 251 + 1
    return torch.stack([numbers.sum(), (numbers * places).sum()])


def _rows_of(args: tuple, kwargs: dict) -> torch.Tensor:
    """The samples that a network is called with."""
    if args:
        return args[0]
    return kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"]


def _unparted(pipe_or_network) -> dict[str, nn.Module]:
    networks = networks_of(pipe_or_network)
    if any(hasattr(type(eager(network)), "_parted") for network in networks.values()):
        raise UsageError("The batch of this network is parted already; undo that first.")
    return networks
