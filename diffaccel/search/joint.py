"""Solver schedules and left-out layers searched together (Li et al. 2023, AutoDiffusion, arXiv 2309.10438)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..samplers.usf import SolverSchedule
from .layer_space import LayerSpace
from .space import SolverSpace

Joint = tuple[SolverSchedule, Mapping]  # (decisions, layers as in a plan file)


@dataclass(frozen=True)
class JointSpace:
    """Pairs of a solver schedule and what is left out of the network in each of its calls.

    Args:
        solvers, layers: the two spaces, with equal numbers of calls.
    """

    solvers: SolverSpace
    layers: LayerSpace

    def key(self, candidate: Joint) -> str:
        """Both as JSON text."""
        return json.dumps([self.solvers.key(candidate[0]), self.layers.key(candidate[1])])

    def draw(self, random: np.random.Generator) -> Joint:
        """Both at random."""
        return self.solvers.draw(random), self.layers.draw(random)

    def mutate(self, candidate: Joint, random: np.random.Generator) -> Joint:
        """A neighbour in one of them or in both."""
        schedule, layers = candidate
        which = random.random()
        if which < 0.7:
            schedule = self.solvers.mutate(schedule, random)
        if which > 0.5:
            layers = self.layers.mutate(layers, random)
        return schedule, layers

    def cross(self, one: Joint, other: Joint, random: np.random.Generator) -> Joint:
        """Both crossed."""
        return self.solvers.cross(one[0], other[0], random), self.layers.cross(one[1], other[1], random)

    def vector(self, candidate: Joint) -> np.ndarray:
        """The real numbers of the schedule."""
        return self.solvers.vector(candidate[0])

    def with_vector(self, candidate: Joint, vector: np.ndarray) -> Joint:
        """The schedule with other real numbers, the layers as they are."""
        return self.solvers.with_vector(candidate[0], vector), candidate[1]

    def tokens(self, candidate: Joint) -> np.ndarray:
        """Network calls of the schedule, each with what it leaves out."""
        return np.concatenate([self.solvers.tokens(candidate[0]), self.layers.tokens(candidate[1])], axis=1)
