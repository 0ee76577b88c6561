"""Exponential moving average of weights."""

import copy

import torch
from torch import nn


class EMA:
    """A frozen copy of a module that follows it: ema ← d·ema + (1−d)·weights, d = min(decay, (1+n)/(10+n)).

    The warm-up of d keeps the first updates from being dominated by the initial weights. A `copy.deepcopy` of the module
    must have its own copy of every parameter and buffer that the module lists; what it does not list may stay shared.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Follow ``module`` after training step ``step`` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for parameter, source in zip(self.module.parameters(), module.parameters(), strict=True):
            parameter.lerp_(source.detach(), 1.0 - decay)
        for buffer, source in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(source)
