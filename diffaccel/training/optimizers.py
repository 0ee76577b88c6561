"""AdamW with moments in 32 or in 8 bits, and the state of either as plain tensors."""

from collections.abc import Iterable

import torch
from torch import nn

from ..core.errors import DataError
from .checkpoint import refuse
from .config import OptimizerConfig
from .extras import extra

_NUMBER = ":number"  # ends the name of what is a plain number in the optimiser, where a tensor would break it


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a role that are trained: those that require gradients now.

    Those in half precision become float32 in place: an update is often smaller than their rounding, and would be lost.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return trained


def optimizer_class(eight_bit: bool) -> type[torch.optim.Optimizer]:
    """AdamW of torch, or of bitsandbytes with moments in 8 bits (Dettmers et al. 2022).

    Raises:
        UsageError: bitsandbytes is wanted and cannot be imported.
    """
    if not eight_bit:
        return torch.optim.AdamW
    return extra("bitsandbytes.optim", "bitsandbytes", "trainer.eight_bit").AdamW8bit


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: OptimizerConfig, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of one role; its learning rate is set anew at every step."""
    fused = {} if eight_bit else {"fused": True}
    return optimizer_class(eight_bit)(
        parameters, lr=settings.lr, betas=tuple(settings.betas), weight_decay=settings.weight_decay, **fused
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's per-parameter state as flat tensors "index.name"; hyper-parameters belong to the config.

    Numbers become float64 or int64 tensors whose names say so, and no two tensors share memory.
    """
    found: dict[str, torch.Tensor] = {}
    memory = set()
    for index, parameter in enumerate(_parameters(optimizer)):
        # Not state_dict(): that of bitsandbytes nests what is quantised.
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{index}.{key}"
            if not isinstance(value, torch.Tensor):
                kind = torch.float64 if isinstance(value, float) else torch.int64
                name, value = name + _NUMBER, torch.tensor(value, dtype=kind)
            elif value.data_ptr() in memory:  # bitsandbytes has one table of levels for all parameters
                value = value.clone()
            memory.add(value.data_ptr())
            found[name] = value.contiguous()
    return found


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Inverse of `optimizer_tensors`.

    Args:
        source: what the tensors are, for the error.

    Raises:
        DataError: state of other parameters, or not all of the state of one.
    """
    state: dict[int, dict[str, torch.Tensor | float]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if not index.isdecimal():
            raise DataError(f"{source} does not fit the model: {name} is not expected.")
        number = key.endswith(_NUMBER)
        state.setdefault(int(index), {})[key.removesuffix(_NUMBER)] = value.item() if number else value
    refuse(_wrong(optimizer, state), source)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _wrong(optimizer: torch.optim.Optimizer, state: dict[int, dict]) -> list[str]:
    parameters = _parameters(optimizer)
    moments = ("exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("state1", "state2")
    wrong = []
    for index, entry in sorted(state.items()):
        if index >= len(parameters):
            wrong.append(f"{index} is not expected, there are {len(parameters)} parameters")
            continue
        wrong += [f"{index}.{key} is missing" for key in ("step", *moments) if key not in entry]
        shape = tuple(parameters[index].shape)
        wrong += [
            f"{index}.{key} has shape {tuple(entry[key].shape)}, expected {shape}"
            for key in moments
            if key in entry and entry[key].shape != shape
        ]
    return wrong


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
