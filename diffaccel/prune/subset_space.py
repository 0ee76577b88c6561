"""The space of sets of operators that save enough, for the strategies of the search package."""

import functools
from dataclasses import dataclass

import numpy as np

from .additivity import nested
from .selection import SOLVERS, Task

Subset = tuple[str, ...]


@dataclass(frozen=True)
class SubsetSpace:
    """Sets of operators, none inside another, that meet a target and of which none can stay without missing it.

    Larger sets are never better where losses grow with what is removed, so they are not in the space.

    Args:
        task: what is to be saved.
    """

    task: Task

    def key(self, subset: Subset) -> str:
        """The same text for the same set."""
        return "+".join(sorted(subset))

    def draw(self, random: np.random.Generator) -> Subset:
        """A random set."""
        return self._fitted(np.zeros(len(self.task.items), bool), random)

    def mutate(self, subset: Subset, random: np.random.Generator) -> Subset:
        """A neighbour, in which one operator or a few more change; different unless there is no other."""
        for _ in range(100):
            mask = self._mask(subset)
            for _ in range(random.geometric(0.5)):
                self._flip(mask, random.integers(len(mask)))
            child = self._fitted(mask, random)
            if self.key(child) != self.key(subset):
                break
        return child

    def cross(self, one: Subset, other: Subset, random: np.random.Generator) -> Subset:
        """Every operator as in one parent or the other, then repaired."""
        masks = self._mask(one), self._mask(other)
        return self._fitted(np.where(random.random(len(masks[0])) < 0.5, *masks), random)

    def vector(self, subset: Subset) -> np.ndarray:
        """Sets have no real numbers."""
        return np.empty(0)

    def with_vector(self, subset: Subset, vector: np.ndarray) -> Subset:
        """The set itself."""
        return subset

    def tokens(self, subset: Subset) -> np.ndarray:
        """(operators, 2): 1 for what goes and 0 for what stays, and the share of the target that it saves."""
        return np.column_stack([self._mask(subset), self._costs / self.task.target])

    def _mask(self, subset: Subset) -> np.ndarray:
        return np.array([item.name in subset for item in self.task.items])

    def _flip(self, mask: np.ndarray, index: int) -> None:
        """Let an operator go in place of all that it contains or is inside of, or let it stay."""
        goes = not mask[index]
        if goes:
            mask[self._related[index]] = False
        mask[index] = goes

    def _fitted(self, mask: np.ndarray, random: np.random.Generator) -> Subset:
        """Without operators inside others, with more until the target is met, then without those that are not needed."""
        mask = mask.copy()
        for index in random.permutation(np.flatnonzero(mask)):
            if mask[index]:
                mask &= ~self._related[index]
        while not self.task.met(self._costs @ mask):
            gains = self._costs - (self._related * mask) @ self._costs
            useful = np.flatnonzero(~mask & (gains > 0.0))
            if not len(useful):  # measured times may be odd: what is inside an operator can save more than all of it
                mask[:] = False
                task = self.task
                mask[SOLVERS["ascending"](task.items, task.costs, [0.0] * len(mask), task.target)] = True
                break
            self._flip(mask, random.choice(useful))
        for index in random.permutation(np.flatnonzero(mask)):
            if self.task.met(self._costs @ mask - self._costs[index]):
                mask[index] = False
        return tuple(item.name for item, goes in zip(self.task.items, mask, strict=True) if goes)

    @functools.cached_property
    def _costs(self) -> np.ndarray:
        return np.array(self.task.costs)

    @functools.cached_property
    def _related(self) -> np.ndarray:
        """(operators, operators): whether one contains the other, the diagonal left out."""
        names = [item.name for item in self.task.items]
        return np.array([[one != other and nested(one, other) for other in names] for one in names])
