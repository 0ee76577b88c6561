"""Gradients of one update: averaged over processes, and named where they are not finite."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .method import Loss

_BUCKET = 2**24  # gradients that are averaged at once: few messages, little extra memory


def average(parameters: list[nn.Parameter], accelerator) -> None:
    """Replace the gradients of ``parameters`` by their means over the processes."""
    if accelerator.num_processes == 1:
        return
    for bucket in _buckets(parameters):
        flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
        parts = accelerator.reduce(flat, "mean").split([parameter.numel() for parameter in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def faulty_loss(phase: str, losses: list[Loss]) -> str | None:
    """Name the first loss of this process that is not finite, and its metric that is not; None if all are."""
    for loss in losses:
        if not torch.isfinite(loss.total):
            first = next((key for key, value in loss.metrics.items() if not math.isfinite(value)), None)
            metric = f" (its metric {first} is {float(loss.metrics[first])})" if first else ""
            return f"{phase} loss is {float(loss.total)}{metric}"
    return None


def faulty_gradient(roles: Mapping[str, nn.Module]) -> str | None:
    """Name the first parameter whose gradient is not finite; None if all are."""
    for role, module in roles.items():
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"gradient of {role} is not finite, first that of {name},"
    return None


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one type, together at most `_BUCKET` numbers unless one alone has more."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        size = sum(other.numel() for other in bucket) + parameter.numel()
        if bucket and (size > _BUCKET or parameter.grad.dtype != bucket[0].grad.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
