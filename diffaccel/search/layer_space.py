"""The space of what is left out of a network, call by call (Li et al. 2023, AutoDiffusion, arXiv 2309.10438)."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..core.errors import UsageError

_SPREAD = 0.02  # of the factors on skip features that are tried, as in the released search of USF


@dataclass(frozen=True)
class LayerSpace:
    """The ``layers`` that a search may choose, drawn, mutated and crossed without ever exceeding a budget.

    Args:
        shares: of the network's cost by name, from `skippable`.
        calls: network calls of a run.
        budget: network evaluations that a run may spend, a guidance pair counted once; None for no bound.
        max_share: of the network that a call may leave out, at most.
        scaling: whether the skip features of a U-Net are scaled too.

    Raises:
        UsageError: a budget that skips within ``max_share`` may not reach.
    """

    shares: Mapping[str, float]
    calls: int
    budget: float | None = None
    max_share: float = 0.5
    scaling: bool = False

    def __post_init__(self):
        if not self.shares or self.calls < 1 or not 0.0 <= self.max_share <= 1.0:
            got = f"{len(self.shares)} layers, {self.calls} calls and {self.max_share:g}"
            raise UsageError(f"A search of layers needs layers, calls and a max_share in [0, 1]; got {got}.")
        least = self.calls * (1.0 - _surely(self.shares, self.max_share))
        if self.budget is not None and self.budget < least:
            raise UsageError(
                f"With max_share {self.max_share:g} the budget must be at least {least:.4g} evaluations; got {self.budget:g}."
            )

    def cost(self, layers: Mapping) -> float:
        """Network evaluations that a run spends, a guidance pair counted once."""
        return float((1.0 - self.tokens(layers)[:, :-1] @ self._costs).sum())

    def key(self, layers: Mapping) -> str:
        """The same text for the same layers."""
        return json.dumps(self._layers(self.tokens(layers)))

    def draw(self, random: np.random.Generator) -> dict:
        """Random layers: every call leaves out a share of its own, between none and the most."""
        genes = np.ones((self.calls, len(self.shares) + 1))
        for row in genes:
            order = random.permutation(len(self.shares))
            row[order] = np.cumsum(self._costs[order]) <= random.uniform(0.0, self.max_share)
        genes[:, -1] -= self.scaling * np.abs(random.normal(0.0, _SPREAD, self.calls))
        return self.fitted(self._layers(genes), random)

    def mutate(self, layers: Mapping, random: np.random.Generator) -> dict:
        """A neighbour, in which one layer or a few more change; different unless there is no other."""
        for _ in range(100):
            genes = self.tokens(layers)
            for _ in range(random.geometric(0.5)):
                place = random.integers(self.calls), random.integers(len(self.shares))
                genes[place] = 1.0 - genes[place]
            genes[:, -1] += self.scaling * random.normal(0.0, _SPREAD, self.calls) * (random.random(self.calls) < 0.5)
            child = self.fitted(self._layers(genes), random)
            if self.key(child) != self.key(layers):
                break
        return child

    def cross(self, one: Mapping, other: Mapping, random: np.random.Generator) -> dict:
        """Every layer of every call, and every factor, as in one parent or the other, as AutoDiffusion has it."""
        one, other = self.tokens(one), self.tokens(other)
        return self.fitted(self._layers(np.where(random.random(one.shape) < 0.5, one, other)), random)

    def fitted(self, layers: Mapping, random: np.random.Generator) -> dict:
        """Skip less in calls that leave out too much, then more wherever that fits until the budget holds."""
        genes, costs, most = self.tokens(layers), self._costs, self.max_share + 1e-9
        skips = genes[:, :-1]
        for row in skips:
            while row @ costs > most:
                row[random.choice(np.flatnonzero(row))] = 0.0
        while self.budget is not None and self.calls - (skips @ costs).sum() > self.budget + 1e-9:
            fitting = np.argwhere((skips == 0.0) & ((skips @ costs)[:, None] + costs <= most))
            skips[tuple(random.choice(fitting))] = 1.0
        return self._layers(genes)

    def tokens(self, layers: Mapping) -> np.ndarray:
        """(calls, layers + 1) genes: 1 for what is skipped and 0 for what is not, and the factor on skip features."""
        skips = [[name in names for name in self.shares] for names in layers.get("skip", [()] * self.calls)]
        scales = [1.0 if factor is None else float(factor) for factor in layers.get("scale", [None] * self.calls)]
        return np.column_stack([skips, scales])

    @property
    def _costs(self) -> np.ndarray:
        return np.array([*self.shares.values()])

    def _layers(self, genes: np.ndarray) -> dict:
        layers: dict = {"skip": [[name for name, gene in zip(self.shares, row, strict=False) if gene] for row in genes]}
        factors = np.clip(genes[:, -1], 0.0, 1.0).tolist()
        if min(factors) < 1.0:
            layers["scale"] = [None if factor == 1.0 else factor for factor in factors]
        return layers


def calls_within(shares: Mapping[str, float], budget: float, max_share: float) -> int:
    """The most calls whose cost can be brought below a budget of whole calls, whatever is left out first."""
    return math.floor(budget / (1.0 - _surely(shares, max_share)) + 1e-9)


def _surely(shares: Mapping[str, float], max_share: float) -> float:
    """What a call leaves out at least when layers are added in any order as long as they fit."""
    usable = [share for share in shares.values() if share <= max_share]
    return sum(usable) if sum(usable) <= max_share else max_share - max(usable)
