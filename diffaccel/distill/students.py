"""Students that are smaller than their teacher: fewer channels, fewer layers, or a network from a folder."""

import math

import torch

from ..core.errors import UsageError
from ..core.rng import seeded
from ..models.conditioning import kind_of
from ..models.denoiser import NetworkDenoiser
from ..models.opened import open_teacher
from ..models.pixel import PixelDenoiser
from ..models.teachers import load_pipeline


def narrower(teacher: NetworkDenoiser, channels: tuple[int, ...], seed: int) -> NetworkDenoiser:
    """A U-Net with other widths and the teacher's shape otherwise, with initial weights by ``seed``.

    Groups of normalisation, and widths of attention heads, are the largest that divide all widths and the teacher's.

    Args:
        channels: of each resolution, as many as the teacher has.

    Raises:
        UsageError: a transformer, another number of widths, or widths that the network cannot have.
    """
    config = teacher.net.config
    own = config.get("block_out_channels")
    if own is None:
        raise UsageError("method.channels are widths of U-Nets; for a transformer set method.layers.")
    if len(channels) != len(own) or not all(count > 0 for count in channels):
        raise UsageError(
            f"method.channels must be {len(own)} widths, as the teacher's {list(own)}; got {list(channels)}."
        )
    changes = {"block_out_channels": channels, "norm_num_groups": math.gcd(config.norm_num_groups, *channels)}
    if isinstance(teacher, PixelDenoiser) and config.attention_head_dim:
        changes["attention_head_dim"] = math.gcd(config.attention_head_dim, *channels)
    return _remade(teacher, seed, **changes)


def shallower(teacher: NetworkDenoiser, layers: int, seed: int) -> NetworkDenoiser:
    """A transformer with fewer layers, with initial weights by ``seed``.

    Raises:
        UsageError: no transformer, or not fewer layers.
    """
    own = teacher.net.config.get("num_layers")
    if own is None:
        raise UsageError("method.layers are those of a transformer; for a U-Net set method.channels.")
    if not 1 <= layers <= own:
        raise UsageError(f"method.layers must be in 1 … {own}, those of the teacher; got {layers}.")
    return _remade(teacher, seed, num_layers=layers)


def opened(folder: str, teacher: NetworkDenoiser) -> NetworkDenoiser:
    """The network of a pipeline, such as one that `diffaccel prune` made of the teacher's.

    Raises:
        UsageError: one that takes something else than the teacher, predicts something else, or has another schedule.
        DataError, MissingWeightsError: see `load_pipeline`.
    """
    student = open_teacher(load_pipeline(folder)).denoiser
    wanted, found = _described(teacher), _described(student)
    if wanted != found:
        raise UsageError(f"The student in {folder} has {found}; the teacher has {wanted}.")
    fractions = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    levels = [torch.stack(one.schedule.level(one.schedule.time(fractions))) for one in (teacher, student)]
    if type(student.schedule) is not type(teacher.schedule) or not torch.allclose(*levels, rtol=1e-4):
        raise UsageError(f"The student in {folder} has another noise schedule than the teacher.")
    return student.float().requires_grad_(True)


def _described(denoiser: NetworkDenoiser) -> str:
    return f"{kind_of(denoiser.net)}, {denoiser.prediction_type}"


def _remade(teacher: NetworkDenoiser, seed: int, **changes) -> NetworkDenoiser:
    kind, own = type(teacher.net), teacher.net.config
    if own.get("pruned_layers"):
        raise UsageError(
            "A pruned teacher cannot be made narrower or shallower; give a smaller network with method.start."
        )
    with seeded(seed):
        try:
            net = kind.from_config({**own, **changes})
        except (ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
            raise UsageError(f"{kind.__name__} cannot be made with {changes}: {error}") from None
    arguments = [net, teacher.schedule, teacher.prediction_type]
    if not isinstance(teacher, PixelDenoiser):
        arguments.append({name: value[0] for name, value in teacher.null_condition(1).items()})
    return type(teacher)(*arguments).to(next(teacher.parameters()).device)
