"""A network's batch in parts: one after the other, which takes less memory, or each on its own process, which takes less time.

Pipelines with classifier-free guidance give their network a batch of both branches. Where its rows do not depend on each
other, the network is given parts of the batch, and nothing else of the pipeline changes. Several images are parted likewise.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..core.errors import UsageError
from ..core.processes import Processes
from ..core.standins import Overlay
from ..models.batches import WITHOUT_BATCH, find_samples, has_rows, is_list_of_samples, joined, part
from ..models.networks import device_of, eager, networks_of
from .exchange import Exchange

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
_Call = Callable[[Callable, tuple, dict], object]


class Parted:
    """What `sequential_cfg` and `parallel_cfg` return.

    Attributes:
        parted: calls of networks whose batch was parted.
        whole: calls that ran as they came, because their rows cannot be parted evenly, or depend on each other.
    """

    def __init__(self, networks: dict[str, nn.Module], call: _Call):
        self.parted = self.whole = 0
        methods = {
            network: {"__call__": self._calling(network, call), "_parted": True} for network in networks.values()
        }
        self._overlay = Overlay(methods)
        self.redo()

    def undo(self) -> None:
        """Give every network its class back; without effect the second time."""
        self._overlay.off()

    def redo(self) -> None:
        """Part batches again after `undo`; without effect where that is so already."""
        self._overlay.on()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()

    def _calling(self, network: nn.Module, call: _Call) -> Callable:
        parent, attending = type(network).__call__, _attending(network)

        def __call__(network, *args, **kwargs):
            if not self._overlay.active:
                return parent(network, *args, **kwargs)
            result = None
            if not _depends(network, attending):
                result = call(lambda given: parent(network, *given[0], **given[1]), args, kwargs)
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
        pipe_or_network: any diffusers pipeline, or its network, as it is before ``torch.compile(network)``.
        parts: into how many the rows of a batch are divided, where their number allows it.

    Raises:
        UsageError: neither pipeline nor network, less than two parts, a network whose batch is parted already, or one whose
            rows depend on each other (attention across the batch, as of PAG, or a cache from step to step).
    """
    if not isinstance(parts, int) or parts < 2:
        raise UsageError(f"parts is a whole number from 2; got {parts!r}.")

    def call(evaluate, args, kwargs):
        divided = divide(args, kwargs, parts)
        return divided and joined([evaluate(given) for given in divided])

    return Parted(_partable(pipe_or_network), call)


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
        UsageError: a single process, or what `sequential_cfg` refuses.
        NumericalError: later, when processes call the network with different arguments.
    """
    networks = _partable(pipe_or_network)
    devices = {str(device_of(network)) for network in networks.values()}
    processes = Processes(next(iter(devices)))
    if processes.world == 1:
        raise UsageError(
            "Guidance on several processes needs them: start this with `torchrun --nproc_per_node 2 FILE.py`, on the command "
            "line `torchrun --nproc_per_node 2 -m diffaccel …`, or use sequential_cfg in one process."
        )
    if {_indexed(torch.device(name)) for name in devices} != {_indexed(processes.device)}:
        raise UsageError(
            f"The networks are on {' and '.join(devices)}, but this process computes on {processes.device}: "
            f'move the pipeline there, pipe.to("{processes.device}").'
        )
    exchange = Exchange(processes)

    def call(evaluate, args, kwargs):
        divided = None if torch.is_grad_enabled() else divide(args, kwargs, processes.world)
        if divided is None:
            return None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return joined(exchange.gather(evaluate(divided[processes.rank]), tensors))

    return Parted(networks, call)


def divide(args: tuple, kwargs: dict, parts: int) -> list[tuple[tuple, dict]] | None:
    """The arguments of a call in equal parts by its samples.

    Returns:
        (args, kwargs) of each part; None where their number is no multiple of ``parts``, or where it is not known which
        sample something belongs to.
    """
    samples = find_samples(args, kwargs)
    if not isinstance(samples, (torch.Tensor, list)):
        return None
    rows = len(samples)
    if rows % parts or not all(_understood(value, rows, "") for value in (*args, kwargs)):
        return None
    return [(tuple(part(args, rows, i, parts)), part(kwargs, rows, i, parts)) for i in range(parts)]


def _understood(value, rows: int, name: str) -> bool:
    """Whether all of an argument is for every sample or for one each."""
    if name in WITHOUT_BATCH or isinstance(value, _PLAIN) or is_list_of_samples(value, rows):
        return True
    if isinstance(value, dict):
        return all(_understood(item, rows, key) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        numbers = len(value) == rows and any(isinstance(item, (bool, int, float, str)) for item in value)
        return not numbers and all(_understood(item, rows, name) for item in value)
    return isinstance(value, torch.Tensor) and (value.ndim == 0 or len(value) == 1 or has_rows(value, rows, name))


def _partable(pipe_or_network) -> dict[str, nn.Module]:
    """The networks, if rows of their batches can be evaluated apart."""
    networks = networks_of(pipe_or_network)
    for network in networks.values():
        if network is not eager(network):
            raise UsageError(
                "A network compiled by torch.compile(network) cannot be parted; use network.compile() instead."
            )
        if hasattr(type(network), "_parted"):
            raise UsageError("The batch of this network is parted already; undo that first.")
        if reason := _depends(network, _attending(network)):
            raise UsageError(f"Rows of this network's batch depend on each other: {reason}.")
    return networks


def _attending(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, "processor")]


def _depends(network: nn.Module, attending: list[nn.Module]) -> str | None:
    """Why rows cannot be evaluated apart, or None. Pipelines set processors and caches in the middle of a call, too."""
    if getattr(network, "is_cache_enabled", False):
        return "a cache is enabled; disable_cache() ends that"
    for module in attending:
        cls = type(module.processor)
        if not cls.__module__.startswith("diffusers.models.") or "PAG" in cls.__name__:
            return f"{cls.__name__} may attend from one to the other"
    return None


def _indexed(device: torch.device) -> tuple[str, int]:
    return device.type, (device.index or 0) if device.type == "cuda" else 0
